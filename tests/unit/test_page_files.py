"""The page's own files: whole, small, and within its content security policy."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import serve.page

PAGE = Path(serve.page.__file__).parent
SWAGGER = {"docs.html", "docs.js", "vendor/swagger-ui"}
MAX_BYTES = 150_000

_IMPORT = re.compile(r"""(?:from|import)\s*\(?\s*["']([^"']+)["']""")
_CSS_URL = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")
_ADDRESS = re.compile(r"https?://[^\s\"'`)<>]+")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_NAMESPACE = "http://www.w3.org/2000/svg"


def _files(*kinds: str) -> list[Path]:
    own = [path for path in PAGE.rglob("*") if path.is_file() and path.suffix in {f".{kind}" for kind in kinds}]
    return sorted(path for path in own if not _is_swagger(path))


def _is_swagger(path: Path) -> bool:
    name = path.relative_to(PAGE).as_posix()
    return any(name == part or name.startswith(f"{part}/") for part in SWAGGER)


class _Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in {"script", "style"} and data.strip():
            self.inline.append(self._inside)


@pytest.fixture(scope="module")
def index() -> _Elements:
    return _Elements((PAGE / "index.html").read_text(encoding="utf-8"))


def test_page_refers_only_to_files_that_exist(index: _Elements) -> None:
    loaded = [
        value
        for tag, attributes in index.found
        for name, value in attributes.items()
        if value and (name == "src" or (tag == "link" and name == "href"))
    ]

    assert len(loaded) >= 5
    for address in loaded:
        assert address.startswith("/static/"), address
        assert (PAGE / address.removeprefix("/static/")).is_file(), address


def _modules() -> list[Path]:
    return [path for path in _files("js") if "vendor" not in path.parts]


@pytest.mark.parametrize("path", _modules(), ids=lambda path: path.name)
def test_modules_import_only_files_that_exist(path: Path) -> None:
    for imported in _IMPORT.findall(path.read_text(encoding="utf-8")):
        assert imported.startswith("./"), imported
        assert (path.parent / imported).is_file(), imported


def test_styles_load_nothing() -> None:
    for path in _files("css"):
        assert not _CSS_URL.findall(path.read_text(encoding="utf-8")), path.name


def test_page_has_no_inline_script_style_or_handler(index: _Elements) -> None:
    assert not index.inline
    for tag, attributes in index.found:
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag


def test_scripts_never_write_markup() -> None:
    for path in _modules():
        text = path.read_text(encoding="utf-8")
        for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert sink not in text, f"{path.name}: {sink}"


@pytest.mark.parametrize("path", _files("html", "js", "css", "svg"), ids=lambda path: path.name)
def test_files_name_no_other_origin(path: Path) -> None:
    text = _COMMENT.sub("", path.read_text(encoding="utf-8"))

    assert set(_ADDRESS.findall(text)) <= {_NAMESPACE}


def test_ids_are_unique_and_every_id_the_scripts_use_exists(index: _Elements) -> None:
    ids = [attributes["id"] for _, attributes in index.found if attributes.get("id")]
    assert len(ids) == len(set(ids))

    for path in _modules():
        for used in re.findall(r'byId\("([\w-]+)"\)', path.read_text(encoding="utf-8")):
            assert used in ids, f"{path.name}: {used}"


def test_every_control_has_a_name(index: _Elements) -> None:
    labelled = {attributes.get("for") for tag, attributes in index.found if tag == "label"}
    for tag, attributes in index.found:
        if tag in {"input", "textarea", "select"}:
            assert attributes.get("id") in labelled or attributes.get("aria-label"), attributes
        if tag == "img":
            assert "alt" in attributes


def test_chart_library_comes_with_its_licence() -> None:
    assert "MIT" in (PAGE / "vendor/uplot/LICENSE").read_text(encoding="utf-8")


def test_page_is_small() -> None:
    total = sum(path.stat().st_size for path in _files("html", "js", "css", "svg"))

    assert total < MAX_BYTES, f"{total} bytes"


def _luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_have_contrast(theme: int) -> None:
    blocks = re.findall(r":root\s*\{(.*?)\}", (PAGE / "style.css").read_text(encoding="utf-8"), re.DOTALL)
    colour = dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})", blocks[theme]))

    for name in ("ink", "muted", "accent", "ok", "danger-ink"):
        for ground in ("page", "surface"):
            assert _contrast(colour[name], colour[ground]) >= 4.5, f"{name} on {ground}"
    for label in ("negative", "neutral", "positive", "other"):
        assert _contrast(colour[f"{label}-ink"], colour["surface"]) >= 4.5, f"{label}-ink"
        assert _contrast(colour[label], colour["surface"]) >= 2.5, label
    assert _contrast(colour["on-accent"], colour["accent"]) >= 4.5
    assert _contrast(colour["warn-ink"], colour["warn-surface"]) >= 4.5
    assert _contrast(colour["control-line"], colour["surface"]) >= 3
