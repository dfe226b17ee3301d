"""The report is well-formed, self-contained, escaped, accessible and says what the run's files say."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from synthetic_run import CONFIG, STAMP, STATEMENT, write_run

from fedlm.errors import DataError, OutputError
from simulations.report import compare_table, write_report
from simulations.report.style import DARK, LIGHT

HOSTILE = "</pre></style><script>alert(1)</script><img src='http://example.org/x' onerror=alert(1)>&\x00\x1b"
HOSTILE_CONFIG = f"[data]\ncorpus = {json.dumps(HOSTILE)}\n"
SCENARIOS: dict[str, dict[str, Any]] = {
    "whole": {},
    "stamped twice": {"stamps": ("NOT PRIVATE", STAMP)},
    "no stamp": {"stamps": ()},
    "base only": {"rounds": 0},
    "one round": {"rounds": 1},
    "not private": {"private": False, "stamps": ("NOT PRIVATE",)},
    "seldom evaluated": {"eval_every": 0},
    "long": {"rounds": 700},
    "bare start": {"start": {"blocks": None, "versions": None, "clip_norm": None, "time": None, "privacy": {}}},
    "hostile": {
        "stamps": (HOSTILE,),
        "config": HOSTILE_CONFIG,
        "start": {"machine": HOSTILE, "versions": {HOSTILE: "\ud800"}, "time": HOSTILE},
    },
}


class Page(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def render(folder: Path, **options: Any) -> tuple[str, ElementTree.Element]:
    source = write_report(write_run(folder, **options)).read_text(encoding="utf-8")
    return source, ElementTree.fromstring(source)


def words(node: ElementTree.Element | None) -> str:
    return " ".join(" ".join(node.itertext()).split()) if node is not None else ""


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_run_renders_to_a_closed_safe_page(tmp_path: Path, name: str) -> None:
    source, root = render(tmp_path / "run", **SCENARIOS[name])
    page = Page(source)
    assert source.startswith("<!DOCTYPE html>\n")
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"} & set(page.tags)
    assert page.tags.count("style") == 1
    for attribute, value in page.attributes:
        assert not attribute.startswith("on")
        assert attribute not in {"src", "href", "style", "action"}
        assert "url(" not in value or value.startswith("url(#")
    assert "url(" not in words(root.find(".//style"))
    assert "@import" not in words(root.find(".//style"))
    assert "NaN" not in source
    assert name == "hostile" or not re.search(r"//|http:|https:|data:", source)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_image_has_a_name_and_a_description_and_ids_are_unique(tmp_path: Path, name: str) -> None:
    _, root = render(tmp_path / "run", **SCENARIOS[name])
    ids = [node.attrib["id"] for node in root.iter() if "id" in node.attrib]
    assert len(ids) == len(set(ids))
    for image in root.iter("svg"):
        labels = image.attrib["aria-labelledby"].split()
        parts = {node.attrib.get("id"): words(node) for node in image if node.tag in {"title", "desc"}}
        assert image.attrib["role"] == "img"
        assert list(parts) == labels
        assert all(parts.values())
    assert len(root.findall(".//figure")) == 9
    assert len(root.findall(".//h1")) == 1


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    _, root = render(tmp_path / "run", **SCENARIOS["hostile"])
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert "".join(root.find(".//pre").itertext()) == HOSTILE_CONFIG  # type: ignore[union-attr]
    assert shown in words(root.find(".//details[3]"))
    assert "\ufffd" in words(root.find(".//details[3]"))


def test_the_tiles_are_the_run_s_figures(tmp_path: Path) -> None:
    _, root = render(tmp_path / "run")
    tiles = [words(tile) for tile in root.findall(".//section[@class='tiles']/div")]
    assert tiles[0] == "perplexity 412.3 → 234.6 43.1 % lower than the base"
    # 0.55 + 0.26 sqrt(30) = 1.97407: a bound is rounded up.
    assert tiles[2].startswith("epsilon 1.975 at delta 1e-6")
    assert tiles[3].startswith("up / down per device 2.31 / 2.40 MB")
    assert tiles[4].startswith("peak device memory 148 MB")
    assert tiles[6] == "time 3 min 45 s 30 rounds"


@pytest.mark.parametrize("stamp", ["NOT PRIVATE", STAMP])
def test_a_stamp_stands_in_the_title_at_the_name_at_epsilon_and_over_the_statement(tmp_path: Path, stamp: str) -> None:
    _, root = render(tmp_path / "run", stamps=(stamp,))
    short = stamp.partition(":")[0]
    assert words(root.find("head/title")).startswith(short)
    assert short in words(root.find(".//h1"))
    assert short in words(root.findall(".//section[@class='tiles']/div")[2])
    box = root.find(".//section[@class='privacy stamped']")
    assert stamp in words(box)
    assert STATEMENT in words(box)


def test_no_stamp_no_warning(tmp_path: Path) -> None:
    source, _ = render(tmp_path / "run", stamps=())
    assert "\N{WARNING SIGN}" not in source


def test_an_infinite_epsilon_is_said_in_words(tmp_path: Path) -> None:
    _, root = render(tmp_path / "run", private=False, stamps=("NOT PRIVATE",))
    assert words(root.findall(".//section[@class='tiles']/div")[2]).startswith("epsilon none no finite bound")
    assert "no differential privacy guarantee" in words(root.find(".//section[@class='privacy stamped']"))


def test_figures_that_only_a_simulation_sees_are_labelled_and_absent_otherwise(tmp_path: Path) -> None:
    _, root = render(tmp_path / "simulated")
    box = root.find(".//section[@class='raw']")
    assert words(box).startswith("Updates Simulation only, not private.")
    assert "devices, median" in words(box)
    run = write_run(tmp_path / "deployed")
    lines = [json.loads(line) | {"non_private": None} for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    deployed = ElementTree.fromstring(write_report(run).read_text())
    assert deployed.find(".//section[@class='raw']") is None
    assert "devices, median" not in words(deployed)
    assert "Update norms by round" in words(deployed)


def test_the_table_has_every_round(tmp_path: Path) -> None:
    _, root = render(tmp_path / "run")
    rows = [[words(cell) for cell in row] for row in root.findall(".//tbody/tr")]
    assert [row[0] for row in rows] == [str(i) for i in range(31)]
    assert len({len(row) for row in rows}) == 1
    assert (rows[0][1], rows[1][1], rows[30][1]) == ("412.3", "–", "234.6")  # noqa: RUF001
    assert [row[5] for row in rows[1:4]] == ["1", "1", "3"]


def test_the_table_has_the_losses_of_every_round_by_cause(tmp_path: Path) -> None:
    _, root = render(tmp_path / "run")
    names = [words(cell) for cell in root.findall(".//thead/tr[2]/th")]
    rows = [[words(cell) for cell in row] for row in root.findall(".//tbody/tr")]
    assert len(rows[0]) == len(names)
    for cause, total in (("not enough memory", 30), ("dropped out", 20)):
        column = [row[names.index(cause)] for row in rows]
        assert sum(int(cell) for cell in column if cell.isdigit()) == total


def test_traffic_is_that_of_a_device_in_every_round(tmp_path: Path) -> None:
    _, root = render(tmp_path / "run")
    chart = next(svg for svg in root.iter("svg") if words(svg.find("title")) == "Perplexity by traffic")
    tips = [tip.text or "" for tip in chart.findall(".//g[@class='probes']/g/title")]
    assert tips[0] == "at 0\nperplexity 412.3"
    assert tips[-1] == "at 141.4\nperplexity 234.6"  # 30 rounds of 2,310,144 + 2,404,352 bytes.


def test_outcomes_and_bytes_are_the_ledger_s(tmp_path: Path) -> None:
    _, root = render(tmp_path / "run")
    texts = {words(svg.find("title")): words(svg.find("desc")) for svg in root.iter("svg")}
    assert texts["Devices by outcome"] == (
        "trained: 3,035 · 98 %; failed: not enough memory: 30 · < 1 %; failed: dropped out: 20 · < 1 %"
    )
    assert texts["Bytes of an update"].startswith("embedding rows (1 block): 2.3 MB · 91 %; LoRA, factors A (3 blocks)")


@pytest.mark.parametrize(
    ("colours", "ground", "text"),
    [
        *product((LIGHT, DARK), ("card", "paper"), ("ink", "soft", "a", "b", "c", "alarm")),
        *product((LIGHT, DARK), ("wash",), ("ink", "soft", "a")),
        *product((LIGHT, DARK), ("alarm",), ("on-alarm",)),
    ],
)
def test_text_has_the_contrast_of_wcag_aa(colours: dict[str, str], ground: str, text: str) -> None:
    lighter, darker = sorted((_luminance(colours[ground]), _luminance(colours[text])), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def test_the_report_replaces_an_older_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    before = {path.name for path in run.iterdir()}
    assert write_report(run) == run / "report.html"
    first = (run / "report.html").read_bytes()
    assert write_report(run).read_bytes() == first
    assert {path.name for path in run.iterdir()} == before | {"report.html"}


def test_a_report_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "report.html").mkdir()
    before = sorted(run.iterdir())
    with pytest.raises(OutputError, match=r"report\.html cannot be written"):
        write_report(run)
    assert sorted(run.iterdir()) == before


def test_a_folder_that_is_not_a_run_gets_no_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a run folder"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_compared_runs_show_what_differs_and_nothing_else(tmp_path: Path) -> None:
    changed = CONFIG.replace("rank = 8", "rank = 4").replace("rounds = 30", "rounds = 10") + "mechanism = 'gaussian'\n"
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", rounds=10, config=changed)]
    first, second = compare_table(runs)
    assert list(first) == list(second)
    assert (first["trainable.lora.rank"], second["trainable.lora.rank"]) == (8, 4)
    assert (first["privacy.mechanism"], second["privacy.mechanism"]) == (None, "gaussian")
    assert (first["rounds"], second["rounds"]) == (30, 10)
    assert [key for key in first if "." in key] == ["trainable.lora.rank", "privacy.mechanism"]
    assert compare_table([]) == []


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
