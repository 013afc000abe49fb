"""The report: whole without a network, safe for any text, honest in words."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from audited import EVIL, edit, facts, localization

from excise.comparison import paired, roles
from excise.page import number, plain
from excise.report import edit_table, facts_table, localization_table, results_table, text_table, write_report
from excise.scores import Results, Row, Score
from excise.verdict import verdict

VOID = {"meta", "br", "img", "link", "input", "hr"}


def results(
    *,
    edited: float = 0.0,
    retain: float = 1.0,
    control: float = 1.0,
    inside: float = 0.0,
    question: float | None = None,
    subjects: int = 60,
    arms: tuple[str, ...] = ("before", "rocr", "control", "oracle"),
) -> Results:
    """Planted results: the share of prompts answered per arm and group, spread evenly."""
    planted = {
        "before": (1.0, 1.0, 1.0),
        "rocr": (edited, retain, inside),
        "control": (control, 1.0, 1.0),
        "oracle": (0.0, 1.0, 0.0),
    }
    scores: dict[tuple[str, str], tuple[Score, ...]] = {}

    def hits(share: float) -> list[float]:
        return [float(int((i + 1) * share + 1e-9) > int(i * share + 1e-9)) for i in range(subjects)]

    for arm in arms:
        forget, kept, lens = planted[arm]
        asked = []
        for form in ("statement", "question"):
            share = question if arm == "rocr" and form == "question" and question is not None else forget
            asked += [Score(f"f{i}", f"s{i}", "forget", v, form, detail=EVIL) for i, v in enumerate(hits(share))]
            for group in ("retain", "neighbour"):
                asked += [Score(f"{group}{i}", f"{group}{i}", group, v, form) for i, v in enumerate(hits(kept))]
        scores[arm, "recall"] = tuple(asked)
        seen = [
            Score(f"f{i}", f"s{i}", "forget", v, "statement", variant="hit@5, any layer")
            for i, v in enumerate(hits(lens))
        ]
        curve = [
            Score(f"f{i}", f"s{i}", "forget", -1.0 * layer, "statement", variant=f"log-probability, layer {layer}")
            for i in range(4)
            for layer in (0, 1)
        ]
        scores[arm, "lens"] = (*seen, *curve)
        scores[arm, "drift"] = (
            Score("t", "", "general", 0.01 * len(arm), "text", variant="loss"),
            Score("u", "", "", None, reason=f"none {EVIL}"),
        )
    return Results(scores, {"before": "none", "rocr": "weight", "control": "weight", "oracle": "none"})


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    recipe = {
        "command": f"excise run {EVIL}",
        "versions": {"excise": "0.1.0"},
        "seeds": [0, 1],
        "fingerprints": {"model": EVIL},
    }
    path = write_report(
        folder,
        facts=facts(),
        localization=localization(),
        edit=edit(),
        results=results(inside=1.0),
        verification={"ok": EVIL},
        recipe=recipe,
        samples=[{"prompt": EVIL, "before": "a", EVIL: "b"}],
        title=EVIL,
    )
    assert path == folder / "report.html" and list(folder.iterdir()) == [path]
    return path.read_text("utf-8")


class Reader(HTMLParser):
    """Tags with attributes, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_the_page_is_wellformed_small_and_alone(page: str) -> None:
    read = Reader(page)
    assert read.open == []
    assert len(page.encode()) < 8_000_000
    for tag, attributes in read.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                assert str(value).startswith(("#", "data:image/"))
    for url in re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}[^\"'\s<]*", page):
        assert url in ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")
    assert "@import" not in page and "@font-face" not in page


def test_the_policy_allows_our_script_only(page: str) -> None:
    policy = next(
        a["content"] for t, a in Reader(page).tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in str(policy) and "default-src 'none'" in str(policy)


def test_all_text_is_escaped(page: str) -> None:
    tags = Reader(page).tags
    assert [t for t, _ in tags].count("script") == 1
    assert "img" not in {t for t, _ in tags}
    assert "alert(1)" in page and "onerror=&quot;" in page


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    runs = [write_report(tmp_path / n, localization=localization(), edit=edit()).read_bytes() for n in "ab"]
    assert runs[0] == runs[1]


def test_parts_may_be_missing(tmp_path: Path) -> None:
    text = write_report(tmp_path / "deep" / "page.html").read_text()
    assert "Nothing was measured" in text and Reader(text).open == []
    assert "Recall by form" in write_report(tmp_path, results=results(subjects=4)).read_text()


def test_sections_name_every_arm_form_and_answer(page: str) -> None:
    for part in (
        "Recall by form",
        "Where the facts were found",
        "What the inner layers still show",
        "What was changed",
        "Fact by fact",
        "Verification",
        "Reproduce",
        "Undo",
        "rocr (weight)",
        "<figure><svg",
        "wanted: as oracle",
        "Not measured",
        "0.1.0",
    ):
        assert part in page, part
    assert page.count("<details") > 5


# --- the verdict


def state(of: Results, question: str) -> str:
    return next(f.state for f in verdict(of).findings if question in f.question)


def test_a_clean_edit() -> None:
    said = verdict(results())
    assert said.state == "good"
    assert said.headline == "The model no longer says the facts; what should stay has stayed."
    assert [f.state for f in said.findings] == ["good", "good", "good", "unmeasured", "good", "unmeasured", "good"]
    assert "[0.00, 0.03], n 120, before 1.00" in said.findings[0].text


def test_a_form_that_still_answers_is_named() -> None:
    said = verdict(results(question=0.9))
    assert said.state == "bad"
    assert said.headline.startswith("Not forgotten: questions still answer")
    assert "statements" not in said.findings[0].text


def test_few_facts_show_nothing() -> None:
    said = verdict(results(subjects=6))
    assert [f.state for f in said.findings[:2]] == ["unclear", "unclear"]
    assert "more than a guess cannot be excluded" in said.findings[0].text
    assert said.state == "unclear"


def test_harm_control_and_what_is_inside() -> None:
    assert state(results(retain=0.5), "rest") == "bad"
    assert state(results(control=0.0), "any change") == "bad"
    assert state(results(edited=1.0), "any change") == "unclear"
    assert state(results(inside=1.0), "logit lens") == "bad"
    assert "inside it still holds them" in verdict(results(inside=1.0)).headline
    without = results(arms=("before", "rocr"))
    assert state(without, "logit lens") == "unclear" and state(without, "any change") == "unmeasured"
    for found, expected in ((0.0, "good"), (0.6, "bad")):
        alone = results(arms=("before", "rocr"), inside=found)
        chance = tuple(
            replace(s, variant="hit@5, others' answers", value=0.1) for s in alone.scores["rocr", "lens"][:60]
        )
        alone = Results(alone.scores | {("rocr", "lens"): alone.scores["rocr", "lens"] + chance}, alone.modes)
        assert state(alone, "logit lens") == expected, "others' answers stand in for a model that never knew"


@pytest.mark.parametrize(
    ("then", "now", "state_"), [(0.01, 0.01, "good"), (0.01, 0.017, "good"), (0.1, 0.2, "bad"), (1.0, 1.2, "bad")]
)
def test_a_rise_of_next_to_nothing_is_no_harm(then: float, now: float, state_: str) -> None:
    """However large a share of the loss it is, less than a hundredth of a nat per token goes unheard; equal to the bit is equal."""
    found = results()
    loss = {arm: [then * (1 + i % 3 / 10) for i in range(60)] for arm in ("before", "rocr")}
    loss["rocr"] = [x * now / then for x in loss["before"]]
    mean = sum(loss["before"]) / 60
    drift = {
        (arm, "drift"): tuple(
            Score(f"t{i}", "", "general", v, "text", variant=variant)
            for i in range(60)
            for variant, v in (("loss", loss[arm][i]), ("relative change", (loss[arm][i] - loss["before"][i]) / mean))
        )
        for arm in loss
    }
    assert state(Results(found.scores | drift, found.modes), "rest") == state_


def test_a_hook_is_not_called_lasting() -> None:
    found = results()
    held = Results(found.scores, found.modes | {"rocr": "hook"})
    assert state(held, "last") == "unclear"


def test_roles_by_name_and_by_recipe() -> None:
    assert roles(results()) == {"before": "before", "edited": "rocr", "control": "control", "oracle": "oracle"}
    assert roles(results(), {"roles": {"edited": "control"}})["edited"] == "control"


def test_paired_changes_compare_the_same_prompts() -> None:
    change = paired(results(retain=0.5), "recall", "rocr", "before", "retain")
    assert change is not None and change.value == pytest.approx(-0.5) and change.low < -0.5 < change.high < -0.3
    same = paired(results(), "recall", "rocr", "before", "retain")
    assert same is not None and same.value == 0 and same.low == -same.high and 0.02 < same.high < 0.04
    assert paired(results(), "recall", "rocr", "before", "unknown") is None


# --- fragments


def test_fragments_for_notebooks() -> None:
    for html in (
        facts_table(facts()),
        localization_table(localization()),
        results_table(results()),
        edit_table(edit()),
    ):
        assert Reader(html).open == [] and "<script" not in html and "<table" in html
    assert "and 2 more" in facts_table(facts(), rows=10)


def test_text_table_for_terminals() -> None:
    rows = [
        Row("before", "recall", "forget", "question\x1b[31m", True, "", 0.5, 0.25, 0.75, 8),
        Row("日本", "recall", "forget", "", False, "", 1.0, 1.0, 1.0, 9),
    ]
    lines = text_table(rows).split("\n")
    assert lines[0].split() == ["arm", "evaluation", "group", "form", "split", "value", "95", "%", "interval", "n"]
    assert "held out" in lines[2] and "0.50" in lines[2] and "[0.25, 0.75]" in lines[2]
    assert "\x1b" not in "".join(lines) and lines[2].index("recall") == lines[3].index("recall") + 2
    assert "a\n-\n1" in text_table([{"a": 1}]) and text_table([]) == "(nothing)"


def test_numbers_and_plain_text() -> None:
    assert [number(x) for x in (None, float("nan"), 0.0, 1.0, 0.5, 0.0321, 0.0046, -12.345, 1234.5)] == [
        "\u2013",
        "\u2013",
        "0.00",
        "1.00",
        "0.50",
        "0.032",
        "0.0046",
        "-12.35",
        "1234",
    ]
    assert plain("a\nb\x07\u202ec\ud800") == "a bc"
