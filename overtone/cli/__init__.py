"""The command `overtone`: the one place where serving, ingestion and storage are put together."""


def main() -> None:
    """Run the command line and exit with its code."""
    from overtone.cli.app import run

    run()
