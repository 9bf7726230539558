"""The folders of runs in a storage: which of them have ended, and removing those of the older ones."""

from pyarrow.fs import FileSelector, FileSystem, FileType

from overtone.errors import ConfigurationError

_ENDED = "ended.txt"
"""File of a run's folder that says that its bundle was made; begins with the bundle's version."""


class Runs:
    """The runs of one storage, which is what `--storage` of `python -m train` takes."""

    def __init__(self, storage: str) -> None:
        """`storage`: an absolute path, or an address that pyarrow knows, such as s3://bucket/runs.

        Raises:
            ConfigurationError: there is no such kind of storage.
        """
        try:
            self._files, self._root = FileSystem.from_uri(storage)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"--storage {storage}: {error}") from None

    def begin(self, name: str) -> None:
        """The run `name`, which may have ended before, is at work on its folder.

        Raises:
            ConfigurationError: the storage cannot be reached or written to.
        """
        mark = self._mark(name)
        try:
            if self._files.get_file_info(mark).type == FileType.File:
                self._files.delete_file(mark)
        except OSError as error:
            raise ConfigurationError(f"--storage {self._root}: {error}") from None

    def end(self, name: str, version: str) -> None:
        """The run `name` has made the bundle `version`.

        Raises:
            OSError: the storage does not take it.
        """
        with self._files.open_output_stream(self._mark(name)) as file:
            file.write(f"{version}\n".encode())

    def prune(self, keep: int) -> list[str]:
        """Remove the folders of runs that have ended but for the `keep` last, and return their names.

        Folders of runs that have not ended, to be resumed, are not touched, nor is what is no run.

        Raises:
            OSError: the storage cannot be read, or does not let go of a folder.
        """
        inside = self._files.get_file_info(FileSelector(self._root, allow_not_found=True))
        folders = {self._mark(one.base_name): one for one in inside if one.type == FileType.Directory}
        marks = [one for one in self._files.get_file_info(list(folders)) if one.type == FileType.File]
        marks.sort(key=lambda one: one.mtime, reverse=True)
        removed = [folders[one.path] for one in marks[keep:]]
        for folder in removed:
            self._files.delete_dir(folder.path)
        return [folder.base_name for folder in removed]

    def _mark(self, name: str) -> str:
        return f"{self._root}/{name}/{_ENDED}"
