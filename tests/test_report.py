"""The report: what stands in the page, that it is a sound page, and that nothing is lost or drawn out of view."""

import base64
import io
import math
import re
import wave
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from nexus.errors import BadMedia, NexusError
from nexus.eval.plots import Curves, Point
from nexus.eval.report import Cell, Report, Table, write_report
from nexus.types import Audio, Image

EVIL = '<script>alert("1")</script>\' onload="x" &amp; </table>'
VOID = {"meta", "img", "br", "input", "link", "hr"}
PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
PICTURE = Image(pixels=PIXELS)


class Page(HTMLParser):
    """Reads a page strictly, every tag closed in order, and collects its tags and its visible text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> repeats an attribute"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag and wanted.items() <= attrs.items()]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def page_of(folder: Path, *blocks: Table | Curves, **changes: object) -> Page:
    fields = {"title": "Title", "lead": "Lead.", "facts": (), "sections": (("Section", blocks),)} | changes
    path = folder / "report.html"
    write_report(path, Report(**fields))  # type: ignore[arg-type]
    return Page(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


def one_row(*cells: Cell) -> Table:
    return Table("Table", "", tuple(f"column {i}" for i in range(len(cells))), (cells,))


def tone(seconds: float, rate_hz: int = 16_000) -> Audio:
    times = np.arange(int(seconds * rate_hz)) / rate_hz
    return Audio(samples=(0.5 * np.sin(2770 * times)).astype(np.float32), rate_hz=rate_hz)


def payload(attrs: dict[str, str | None], media_type: str) -> bytes:
    head, _, data = (attrs["src"] or "").partition(",")
    assert head == f"data:{media_type};base64"
    return base64.b64decode(data, validate=True)


# Text


def test_text_from_data_never_becomes_markup(folder: Path) -> None:
    blocks = (
        Table(EVIL, EVIL, (EVIL, "sound", "picture"), ((EVIL, tone(0.1), PICTURE),)),
        Curves(EVIL, EVIL, EVIL, {EVIL: [(0, 1), (1, 2)]}),
    )
    plain = page_of(folder, one_row("a", tone(0.1), PICTURE), Curves("t", "n", "x", {"s": [(0, 1), (1, 2)]}))
    page = page_of(folder, *blocks, title=EVIL, lead=EVIL, facts=((EVIL, EVIL),), sections=((EVIL, blocks),) * 2)
    assert len(page.all("script")) == len(plain.all("script")) == 1
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    # Page title, heading, lead, fact (2). Per section: link, heading; of the table title, note, column, cell; of the
    # plot title, note, legend, axis.
    assert page.text.count(EVIL) == 5 + 2 * 10
    assert page.all("img")[0]["alt"] == f"picture: {EVIL}"
    assert EVIL in str(page.all("svg", role="img")[0]["aria-label"])


def test_characters_a_browser_would_lose_are_shown_by_their_codes(folder: Path) -> None:
    page = page_of(folder, one_row("bell\x07 nul\x00 half\ud800 turned\u202e", "今天 café\nnext line"))
    assert r"bell\x07 nul\x00 half\ud800 turned\u202e" in page.text
    assert "今天 café\nnext line" in page.text


@given(st.lists(st.text(st.characters(), max_size=20), min_size=1, max_size=4))
def test_any_text_makes_a_sound_page_with_that_text(folder: Path, texts: list[str]) -> None:
    page = page_of(folder, Table(texts[0], texts[0], tuple(texts), (tuple(texts),)), title=texts[0])
    assert len(page.all("td")) == len(texts)
    for text in texts:
        if text.isascii() and text.isprintable():
            assert text in page.text


def test_the_page_asks_for_nothing_from_outside(folder: Path) -> None:
    page = page_of(folder, one_row(tone(0.1), PICTURE), Curves("t", "n", "x", {"s": [(0, 1)]}))
    urls = [
        value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "data", "poster")
    ]
    assert all(str(url).startswith(("data:", "#")) for url in urls)
    assert not page.all("link") and "url(" not in page.html and "@import" not in page.html
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert str(policy).startswith("default-src 'none'")


# Tables


@given(st.lists(st.one_of(st.integers(), st.floats(-1e300, 1e300)), min_size=1, max_size=8))
def test_every_number_is_kept_exactly_and_shown_rounded(folder: Path, numbers: list[int | float]) -> None:
    page = page_of(folder, one_row(*numbers))
    kept = [type(number)(str(attrs["value"])) for number, attrs in zip(numbers, page.all("data"), strict=True)]
    assert kept == numbers
    shown = re.findall(r"<data[^>]*>([^<]*)</data>", page.html)
    for number, text in zip(numbers, shown, strict=True):
        exact = isinstance(number, int)
        assert float(text.replace(",", "")) == (number if exact else pytest.approx(number, rel=0.05, abs=5e-4))


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        ((0.12, 0.5), ["0.12", "0.50"]),
        ((0.0912345, 1.0, -0.0), ["0.091", "1.000", "0.000"]),
        ((2.1, None), ["2.1"]),
        ((873.25, 12_345.6), ["873.2", "12,346"]),
        ((0.000123, -0.0004), ["0.00012", "-0.0004"]),
        ((1000, 13_104_512), ["1000", "13,104,512"]),
        ((1e12,), ["1e+12"]),
    ],
)
def test_numbers_of_a_column_are_rounded_alike(folder: Path, column: tuple[Cell, ...], shown: list[str]) -> None:
    page = page_of(folder, Table("t", "", ("numbers",), tuple((cell,) for cell in column)))
    assert re.findall(r"<data[^>]*>([^<]*)</data>", page.html) == shown


def test_what_is_missing_says_so(folder: Path) -> None:
    silent = Audio(samples=np.zeros(0, np.float32), rate_hz=16_000)
    broken = Audio(samples=np.array([0.0, math.nan], np.float32), rate_hz=16_000)
    page = page_of(folder, one_row(None, math.nan, -math.inf, silent, broken), Table("none", "", ("a",), ()))
    missing = re.findall(r'<span class="missing">([^<]*)</span>', page.html)
    assert missing == ["–", "nan", "-inf", "no sound", "sound with values that are not finite", "no rows"]
    assert page.all("audio") == []


def test_marks_are_readable_without_colour_and_without_eyes(folder: Path) -> None:
    page = page_of(folder, one_row(True, False))
    assert [attrs["aria-label"] for attrs in page.all("span", role="img")] == ["right", "wrong"]
    assert "✓" in page.text and "✗" in page.text


def test_bars_stand_behind_numbers_of_the_named_columns_only(folder: Path) -> None:
    rows = ((0.25, 3.0, 7), (0.5, 12.0, 8), (None, -6.0, 9))
    page = page_of(folder, Table("t", "", ("share", "seconds", "n"), rows, bars=("share", "seconds")))
    shares = [str(attrs["style"]).removeprefix("--share:") for attrs in page.all("span", **{"class": "bar"})]
    assert shares == ["25.0%", "25.0%", "50.0%", "100.0%", "0.0%"]


def test_a_ragged_table_or_a_bar_without_a_column_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"rows \[1\] do not have 2 cells"):
        Table("t", "", ("a", "b"), ((1, 2), (1,)))
    with pytest.raises(AssertionError, match="no column for bars"):
        Table("t", "", ("a",), (), bars=("b",))


# Sound and pictures


@given(st.lists(st.integers(-32768, 32767), min_size=1, max_size=50), st.sampled_from([8000, 16_000, 44_100]))
def test_a_sound_in_the_page_holds_the_same_samples(folder: Path, values: list[int], rate_hz: int) -> None:
    samples = np.array(values, np.float32) / 32768
    page = page_of(folder, one_row("a", Audio(samples=samples, rate_hz=rate_hz)))
    (player,) = page.all("audio")
    with wave.open(io.BytesIO(payload(player, "audio/wav"))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (rate_hz, 1, 2)
        assert np.frombuffer(file.readframes(len(values)), "<i2").tolist() == values
    assert "controls" in player and player["aria-label"] == "column 1: a"


def test_a_picture_in_the_page_holds_the_same_pixels(folder: Path) -> None:
    (shown,) = page_of(folder, one_row(PICTURE)).all("img")
    with Pillow.open(io.BytesIO(payload(shown, "image/png"))) as opened:
        np.testing.assert_array_equal(np.asarray(opened), PIXELS)
    assert (shown["width"], shown["height"], shown["alt"]) == ("7", "5", "column 0: row 1")


def test_media_that_are_still_files_are_read(tmp_path: Path) -> None:
    Pillow.fromarray(PIXELS).save(tmp_path / "a.png")
    page = page_of(tmp_path, one_row(Image(path=tmp_path / "a.png")))
    assert len(page.all("img")) == 1
    with pytest.raises(BadMedia, match=r"gone\.wav"):
        page_of(tmp_path, one_row(Audio(path=tmp_path / "gone.wav")))


def test_sixty_sounds_of_two_seconds_stay_under_six_megabytes(folder: Path) -> None:
    sound = tone(2.0)
    page = page_of(folder, Table("t", "", ("sound",), ((sound,),) * 60))
    assert len(page.all("audio")) == 60 and len(page.html) < 6_000_000


# Plots


LEGEND_LINE = "M1,4 23,4"


def lines_of(page: Page, is_legend: bool = False) -> list[dict[str, str | None]]:
    """The lines of all series, or their samples in the legend."""
    lines = [attrs for attrs in page.all("path") if str(attrs["class"]).startswith("line")]
    return [attrs for attrs in lines if (attrs["d"] == LEGEND_LINE) == is_legend]


def drawn_points(page: Page) -> list[tuple[float, float]]:
    """Where lines and marks stand, after checking that they are within the drawing."""
    pairs = [pair for line in lines_of(page) for pair in re.findall(r"[^M ]+", str(line["d"]))]
    pairs += [f"{circle['cx']},{circle['cy']}" for circle in page.all("circle")]
    places = [(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)]
    left, top, width, height = map(float, str(page.all("svg", role="img")[0]["viewbox"]).split())
    assert all(left <= x <= left + width and top <= y <= top + height for x, y in places)
    return places


finite = st.floats(allow_nan=False, allow_infinity=False)
points = st.lists(st.tuples(finite, finite), min_size=1, max_size=70)


@given(st.lists(points, min_size=1, max_size=3))
def test_all_points_are_drawn_in_view_with_finite_ticks(folder: Path, lists: list[list[Point]]) -> None:
    page = page_of(folder, Curves("t", "", "x", {f"series {i}": line for i, line in enumerate(lists)}))
    drawn = drawn_points(page)
    in_lines = sum(len(line) for line in lists if len(line) > 1)
    in_marks = sum(len(line) for line in lists if len(line) <= 60)
    assert len(drawn) == in_lines + in_marks
    labels = re.findall(r'<text class="[xy]"[^>]*>([^<]+)</text>', page.html)
    assert all(math.isfinite(float(label.replace(",", ""))) for label in labels if label != "x")


@pytest.mark.parametrize(
    "series", [[(3, 7.0)], [(0, 2.5), (1, 2.5), (2, 2.5)], [(0, 0.0), (1, 0.0)], [(1, 1e300), (2, 1e300)]]
)
def test_constant_series_and_single_points_stand_in_the_middle(folder: Path, series: list[Point]) -> None:
    heights = {y for _, y in drawn_points(page_of(folder, Curves("t", "", "x", {"a": series})))}
    assert len(heights) == 1 and 80 < heights.pop() < 200


def test_points_that_are_not_finite_interrupt_the_line_and_are_counted(folder: Path) -> None:
    series: list[Point] = [
        (0, 1.0),
        (1, 2.0),
        (2, math.nan),
        (3, 3.0),
        (4, math.inf),
        (math.nan, 2.0),
        (6, 1.0),
        (7, 1.5),
    ]
    page = page_of(folder, Curves("t", "", "x", {"a": series}))
    (line,) = lines_of(page)
    assert [len(stretch.split()) for stretch in str(line["d"]).split("M")[1:]] == [2, 2]
    assert len(page.all("circle")) == 5  # the lone point as well
    assert "3 of 8 points are not finite" in page.text


def test_a_lone_point_among_many_is_not_lost(folder: Path) -> None:
    series: list[Point] = [(float(i), 1.0 + i % 3) for i in range(100)]
    series += [(100, math.nan), (101, 2.0), (102, math.nan)]
    page = page_of(folder, Curves("t", "", "x", {"a": series}))
    assert len(page.all("circle")) == 1


def test_empty_series_are_named_and_an_empty_plot_says_so(folder: Path) -> None:
    page = page_of(folder, Curves("t", "", "x", {"full": [(0, 1)], "hollow": []}))
    assert "hollow" in page.text and page.text.count("no points") == 1
    nothing: tuple[dict[str, list[Point]], ...] = ({}, {"a": []}, {"a": [(0, math.nan)]})
    for series in nothing:
        page = page_of(folder, Curves("t", "", "x", series))
        assert "no points to draw" in page.text and page.all("svg", role="img") == []


@pytest.mark.parametrize(
    ("values", "is_log"),
    [((1.0, 29.0), False), ((1.0, 31.0), True), ((0.0, 1000.0), False), ((-1.0, 100.0), False), ((1e-8, 1e8), True)],
)
def test_the_y_axis_is_logarithmic_where_values_span_a_factor_above_thirty(
    folder: Path, values: tuple[float, float], is_log: bool
) -> None:
    page = page_of(folder, Curves("t", "", "x", {"a": [(0, values[0]), (1, values[1])]}))
    assert ("log scale" in page.text) == is_log


def test_heights_follow_the_axis(folder: Path) -> None:
    linear = drawn_points(page_of(folder, Curves("t", "", "x", {"a": [(0, 1.0), (5, 2.0), (10, 3.0)]})))[:3]
    logarithmic = drawn_points(page_of(folder, Curves("t", "", "x", {"a": [(0, 1.0), (5, 10.0), (10, 100.0)]})))[:3]
    for (x0, y0), (x1, y1), (x2, y2) in (linear, logarithmic):
        assert x0 < x1 < x2 and y0 > y1 > y2
        assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)


def test_lines_stay_tellable_when_there_are_more_than_colours(folder: Path) -> None:
    page = page_of(folder, Curves("t", "", "x", {f"series {i}": [(0, i), (1, i)] for i in range(12)}))
    looks = [line["class"] for line in lines_of(page, is_legend=True)]
    assert len(set(looks)) == 12


# The page and its file


def test_contents_lead_to_every_section_and_captions_name_every_block(folder: Path) -> None:
    sections = (
        ("Scores", (one_row(1), one_row(2))),
        ("Curves", (Curves("c", "", "x", {"a": [(0, 1)]}),)),
        ("Empty", ()),
    )
    page = page_of(folder, sections=sections)
    ids = [str(attrs["id"]) for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert [attrs["href"] for attrs in page.all("a")] == [f"#{attrs['id']}" for attrs in page.all("section")]
    assert len(page.all("section")) == len(sections)
    assert len(page.all("figure")) == len(page.all("figcaption")) == 3
    referred = [str(attrs["aria-labelledby"]) for _, attrs in page.tags if "aria-labelledby" in attrs]
    assert set(referred) <= set(ids)


def test_equal_reports_give_equal_bytes(tmp_path: Path) -> None:
    report = Report("t", "l", (("a", "b"),), (("s", (one_row(0.5, tone(0.1), PICTURE),)),))
    for name in ("first.html", "second.html"):
        write_report(tmp_path / name, report)
    assert (tmp_path / "first.html").read_bytes() == (tmp_path / "second.html").read_bytes()


def test_a_page_replaces_the_old_one_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    real = Path.write_bytes

    def full_disk(self: Path, data: bytes) -> int:
        real(self, data[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(NexusError, match="No space left on device"):
            page_of(tmp_path, one_row(1))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    page_of(tmp_path, one_row(1))
    assert path.read_text().startswith("<!DOCTYPE html>") and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_does_not_exist_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(NexusError, match=r"none/report\.html: cannot be written") as caught:
        write_report(tmp_path / "none" / "report.html", Report("t", "", (), ()))
    assert "\n" not in str(caught.value)
