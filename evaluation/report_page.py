"""A page of text, tables and pictures, as Markdown and as one HTML file. All texts are plain: what would be markup in one
of the two is escaped, so that nothing from a file can become any."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import PIL.Image

_TEMPLATE = Path(__file__).with_name("report_page.html.jinja")
# What means something within a line of GitHub's Markdown. An underscore does where it is not inside a word.
_MARKUP = re.compile(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])")


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        cells: one a column.
        is_measured: whether to set it off as one's own; its first cell then is bold.
    """

    cells: Sequence[str]
    is_measured: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: in a line.
        columns: their names.
        rows: with as many cells.
        num_text_columns: that many from the left hold texts, the others numbers.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    num_text_columns: int


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        name: of its file, letters, digits, "-" and "." only.
        png: the file.
        alternative: what it shows, for those who do not see it.
        caption: the text below.
    """

    name: str
    png: bytes
    alternative: str
    caption: str

    @property
    def data_uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")

    @property
    def width_px(self) -> int:
        """As wide as it would be on paper, in CSS pixels, 96 an inch."""
        with PIL.Image.open(io.BytesIO(self.png)) as image:
            return round(96 * image.width / image.info["dpi"][0])


@dataclass(frozen=True)
class Notes:
    """Remarks, one a line of a list."""

    lines: Sequence[str]


Part = str | Table | Picture | Notes


@dataclass(frozen=True)
class Section:
    """A heading and what is below it; a `str` is a paragraph."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """A title, what is below it, and sections."""

    title: str
    parts: Sequence[Part]
    sections: Sequence[Section]

    @property
    def pictures(self) -> list[Picture]:
        """In the order of the page."""
        parts = [*self.parts, *(part for section in self.sections for part in section.parts)]
        return [part for part in parts if isinstance(part, Picture)]

    def to_markdown(self) -> str:
        """GitHub's Markdown; pictures are links to their files beside it."""
        blocks = [f"# {escape_markdown(self.title)}", *map(_part_to_markdown, self.parts)]
        for section in self.sections:
            blocks += [f"## {escape_markdown(section.title)}", *map(_part_to_markdown, section.parts)]
        return "\n\n".join(blocks) + "\n"

    def to_html(self) -> str:
        """One file with everything in it; it loads nothing from elsewhere."""
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
        return template.render(page=self, kind_of=lambda part: type(part).__name__) + "\n"


def escape_markdown(text: str) -> str:
    """A text of one line that reads as itself in Markdown."""
    return _MARKUP.sub(r"\\\g<0>", text)


def _part_to_markdown(part: Part) -> str:
    if isinstance(part, Table):
        return _table_to_markdown(part)
    if isinstance(part, Picture):
        return f"![{escape_markdown(part.alternative)}]({part.name})\n\n{escape_markdown(part.caption)}"
    if isinstance(part, Notes):
        return "\n".join(f"- {escape_markdown(line)}" for line in part.lines)
    return escape_markdown(part)


def _table_to_markdown(table: Table) -> str:
    num_numbers = len(table.columns) - table.num_text_columns
    lines = [[escape_markdown(name) for name in table.columns]]
    lines.append([*["---"] * table.num_text_columns, *["--:"] * num_numbers])
    for row in table.rows:
        first, *others = map(escape_markdown, row.cells)
        lines.append([f"**{first}**" if row.is_measured else first, *others])
    return "\n".join([f"{escape_markdown(table.title)}:", "", *(f"| {' | '.join(line)} |" for line in lines)])
