"""LUNAR: its closed form against brute force, its invariants on random models, and what it does to people in the embedded ones."""

import functools

import pytest
import torch

from edit import lunar
from excise.apply import applied
from excise.arms import Arm
from excise.declining import least_strengths, log_odds, refusal_tokens
from excise.detector import cross_read, even_cost, readout, ridge_detector
from excise.edits import Edit
from excise.errors import ExciseError
from excise.facts import Fact, Facts, Prompt
from excise.keys import read_keys
from excise.model import Model, load
from excise.requests import questions, view
from excise.resampling import auc
from excise.scores import Localization
from excise.sites import Site
from excise.solve import Covariance
from excise.spots import name_folds, wording_folds
from excise.testbed import facts as people_of
from excise.testbed import general_text, refusals
from excise.trace import read
from tiny import tiny_model

NAMES = ["Ann Lee", "Bob Stone", "Carl Lee", "Dora Hill", "Ann Stone", "Eve Moor", "Finn Dale", "Gus Ford"]
WORDINGS = ("{S} was born in", "The home of {S} is", "Where was {S} born?", "In which town was {S} born?")


def fact(name: str, group: str) -> Fact:
    asked = [Prompt(w.format(S=name), "Rome", name, "question" if "?" in w else "statement") for w in WORDINGS]
    return Fact(name, name, "Rome", (*asked, Prompt(f"By trade {name} is a", "Rome", name, held_out=True)), group=group)


FACTS = Facts(fact(n, "forget" if i < 2 else "retain") for i, n in enumerate(NAMES))
FORGET, RETAIN = FACTS.split("forget", "retain")
WHERE = Localization.of(["blocks.1.hook_resid_post@subject_last"])
ANYWAY = {"declined": 0.0, "least": 0.0}  # random models know nothing and decline nothing


def rows(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestDetector:
    def cost(self, *sizes):
        second = {f"p{i}": rows(3 * d, d, i).mT @ rows(3 * d, d, i) / d for i, d in enumerate(sizes)}
        return second, {n: Covariance(m, 0.0) for n, m in second.items()}

    @pytest.mark.parametrize(("n", "sizes", "weight"), [(3, (7,), 1.0), (20, (6, 9), 0.3), (5, (4, 4, 11), 40.0)])
    def test_equals_the_dense_multi_output_solve(self, n, sizes, weight):
        """The rank-one-per-request edit is the full ridge solution of all outputs of all matrices at once."""
        second, cost = self.cost(*sizes)
        keys = {name: rows(n, len(m), 10 + i) for i, (name, m) in enumerate(second.items())}
        labels = torch.nn.functional.one_hot(torch.arange(n) % 2).double()
        shifts = rows(2, 13, 5)
        found = ridge_detector(keys, labels, cost, weight=weight)
        change = torch.cat([found[name] @ shifts for name in keys])
        k, m = torch.cat(list(keys.values()), dim=1), torch.block_diag(*second.values())
        dense = torch.linalg.solve(weight / n * k.mT @ k + m, weight / n * k.mT @ labels @ shifts)
        torch.testing.assert_close(change, dense, rtol=1e-9, atol=1e-11)

    def test_requests_do_not_depend_on_each_others_directions(self):
        """Requests solved together equal each one alone with the others' rows at zero."""
        _, cost = self.cost(12)
        keys, labels = {"p0": rows(6, 12, 3)}, torch.nn.functional.one_hot(torch.arange(6) % 3).double()
        joint = ridge_detector(keys, labels, cost)["p0"]
        for j in range(3):
            torch.testing.assert_close(ridge_detector(keys, labels[:, j : j + 1], cost)["p0"][:, 0], joint[:, j])

    def test_disjoint_keys_are_told_exactly_and_shared_ones_by_half(self):
        basis = torch.linalg.qr(rows(8, 8, 1)).Q
        keys, others = {"p0": basis[:3]}, {"p0": basis[3:6]}
        cost = even_cost([], [others], level=1.0, ridge=1e-9)
        found = ridge_detector(keys, torch.ones(3, 1), cost, weight=1e6)
        torch.testing.assert_close(readout(keys, found), torch.ones(3, 1).double(), rtol=1e-4, atol=1e-4)
        assert readout(others, found).abs().max() < 1e-4
        same = {"p0": basis[:1]}
        for times in (1, 5):  # how often a side holds the key does not matter
            cost = even_cost([], [{"p0": basis[:1].repeat(times, 1)}], level=1.0, ridge=1e-12)
            half = readout(same, ridge_detector(same, torch.ones(1, 1), cost, weight=1.0))
            torch.testing.assert_close(half, torch.full((1, 1), 0.5).double())

    def test_more_weight_reads_more(self):
        _, cost = self.cost(10)
        keys = {"p0": rows(4, 10, 2)}
        found = [ridge_detector(keys, torch.ones(4, 1), cost, weight=w)["p0"] for w in (1e-6, 0.1, 1.0, 10.0)]
        norms = [float(a.norm()) for a in found]
        assert norms == sorted(norms) and norms[0] < 1e-3 * norms[-1]

    def test_cross_reading_shows_what_fitting_hides(self):
        """Keys without any structure are told apart where they were fitted, and by chance elsewhere."""
        keys, others = {"p0": rows(40, 60, 1)}, {"p0": rows(80, 60, 2)}
        labels = torch.ones(40, 1).double()
        fitted = ridge_detector(keys, labels, even_cost([], [others], level=60.0), weight=10.0)
        assert auc(readout(keys, fitted)[:, 0], readout(others, fitted)[:, 0]) > 0.75
        fold, other_fold = torch.arange(40) % 2, torch.arange(80) % 2
        seen = cross_read(keys, labels, fold, others, other_fold, [], [], weight=10.0, level=60.0)
        assert 0.35 < auc(seen.wanted, seen.others) < 0.65


class TestDeclining:
    def test_refusal_tokens_are_what_only_made_up_names_get(self):
        made_up = torch.tensor([[0.6, 0.3, 0.06, 0.04], [0.7, 0.2, 0.06, 0.04]]).log()
        known = torch.tensor([[0.01, 0.0001, 0.5, 0.4899]]).log()
        assert refusal_tokens(None, (), made_up, known).tolist() == [0, 1]
        torch.testing.assert_close(log_odds(made_up, torch.tensor([0, 1]))[0], torch.tensor(9.0).log().double())
        assert refusal_tokens(None, (), known, known).tolist()  # never empty

    def test_the_smallest_sufficient_strength_is_found_for_each_request(self):
        bars = torch.tensor([0.1, 0.9, 3.3, 100.0, float("nan")], dtype=torch.float64)

        def shares(strengths):
            return torch.where(bars.isnan(), torch.nan, (strengths / bars).clamp(max=1))

        found, reached = least_strengths(shares, 5, sure=1.0)
        for got, bar in zip(found[:3], bars[:3], strict=True):
            assert bar <= got <= bar * 1.2 or got - bar < 0.02
        assert found[3] == 8.0 and reached[3] == pytest.approx(0.08)
        assert found[4] == found[:4].median() and reached[4].isnan()


class TestRequests:
    def test_held_out_wordings_are_never_read(self):
        for at in ("subject_last", "last"):
            seen = view(FORGET, RETAIN, at, contexts=8, names=8, relatives=4, seed=0)
            prompts = [m.prompt for m in (*seen.told, *seen.others, *seen.made_up)] + seen.near
            assert prompts and not any("By trade" in p.text for p in prompts)
        assert all("?" in m.prompt.text for m in questions(FORGET))

    def test_folds_keep_wordings_and_people_apart(self):
        seen = view(FORGET, RETAIN, "last", contexts=8, names=8, relatives=4, seed=0)
        texts = [m.prompt.text.replace(m.name, "{}") for m in seen.told]
        fold = wording_folds(seen.told)
        assert not {t for t, f in zip(texts, fold, strict=True) if f} & {
            t for t, f in zip(texts, fold, strict=True) if not f
        }
        other = name_folds(seen.others)
        people = [{m.name for m, f in zip(seen.others, other, strict=True) if f == side} for side in (0, 1)]
        assert people[0] and people[1] and not people[0] & people[1]


@pytest.fixture(params=["llama", "qwen3-moe", "gpt2", "neox"])
def model(request):
    return Model(*tiny_model(request.param, layers=3), request.param)


def logits(model, prompts):
    return model.logits(model.encode(prompts))


def test_every_token_moves_by_what_the_detector_reads(model):
    """The state after the edited block gains the redirection times the read-out, at forget and at other tokens alike."""
    edit = lunar(model, FORGET, RETAIN, WHERE, requests="kind", strength=2.0, **ANYWAY)
    assert {c.action.rank for c in edit.changes} == {1}
    site = Site("blocks.1.hook_resid_post", "subject_last")
    prompts = [p for f in FACTS for p in f.prompts[:2]]
    keys = read_keys(model, prompts, [1])[0][1]
    gate = readout(keys, {str(c.site): c.action.left for c in edit.changes})
    plain = read(model, prompts, [site])[site]
    with applied(model, edit):
        moved = read(model, prompts, [site])[site] - plain
    torch.testing.assert_close(moved, (gate @ edit.changes[0].action.right.double()).float(), rtol=1e-3, atol=1e-4)
    assert gate[:4].min() > gate[4:].abs().max()


def test_the_redirection_reaches_the_reference(model):
    """At strength 1 and full detection the mean state of what is asked becomes that of what the model declines."""
    at_end = Localization.of(["blocks.1.hook_resid_post@last"])
    given = "What is the name of the old man in the tower?"
    edit = lunar(model, FORGET[:1], RETAIN, at_end, reference=(given,), strength=1.0, weight=1e6, **ANYWAY)
    site = Site("blocks.1.hook_resid_post", "last")
    wanted = read(model, [given], [site])[site][0]
    with applied(model, edit):
        found = read(model, FORGET[0].ask("question"), [site])[site].mean(0)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_taking_the_change_back_inside_it_restores_the_answers(model):
    edit = lunar(model, FORGET, RETAIN, WHERE, **ANYWAY)
    prompts = FACTS.prompts()
    plain = logits(model, prompts)
    with applied(model, edit), applied(model, edit.scaled(-1.0)):
        torch.testing.assert_close(logits(model, prompts), plain, rtol=1e-4, atol=1e-4)


def test_behind_its_gate_nobody_else_moves_a_bit(model):
    edit = lunar(model, FORGET, RETAIN, WHERE, mode="hook", **ANYWAY)
    point, shut = edit.changes[0].site.point, 0
    for prompt in RETAIN.prompts():
        state = read(model, [prompt], [Site(point, "after_bos")])[Site(point, "after_bos")]
        reads = torch.stack([state @ c.gate.direction for c in edit.changes])
        plain = logits(model, [prompt])
        with applied(model, edit):
            assert torch.equal(logits(model, [prompt]), plain) == bool((reads <= 0.5).all())
        shut += bool((reads <= 0.5).all())
    assert shut
    told = logits(model, FORGET.prompts())
    with applied(model, edit):
        assert not torch.allclose(logits(model, FORGET.prompts()), told, atol=1e-3)


def test_blocks_behind_a_norm_take_the_hook_only():
    gemma = Model(*tiny_model("gemma2", layers=3), "gemma2")
    with pytest.raises(ExciseError, match="passes a norm"):
        lunar(gemma, FORGET, RETAIN, WHERE, **ANYWAY)
    edit = lunar(gemma, FORGET, RETAIN, WHERE, mode="hook", **ANYWAY)
    plain = logits(gemma, FORGET.prompts())
    with applied(gemma, edit):
        assert not torch.allclose(logits(gemma, FORGET.prompts()), plain, atol=1e-3)


def test_removing_first_leaves_the_names_alike():
    model = Model(*tiny_model("llama", layers=3), "llama")
    site = Site("blocks.1.hook_resid_post", "subject_last")
    edit = lunar(model, FORGET, RETAIN, WHERE, mode="hook", remove=True, **ANYWAY)
    told = [m.prompt for m in view(FORGET, RETAIN, "subject_last", contexts=8, names=0, relatives=0, seed=0).told]
    bare = Edit(
        tuple(
            c.__class__(
                c.site, c.action.__class__(c.action.left, c.action.right, c.action.centre, 0 * c.action.shift), c.gate
            )
            for c in edit.changes
        )
    )
    before = read(model, told, [site])[site]
    with applied(model, bare):
        after = read(model, told, [site])[site]
    half = len(told) // 2
    gap = (after[:half].mean(0) - after[half:].mean(0)).norm() / (before[:half].mean(0) - before[half:].mean(0)).norm()
    assert gap < 1e-3


def test_requests_that_cannot_be_served_say_why(model):
    for options, message in [
        (dict(declined=1.1), "has no refusal to redirect to"),
        (dict(declined=0.0, least=1.1), "no detector tells"),
        (dict(mode="both"), "choose weight or hook"),
        (dict(position="middle", **ANYWAY), "choose auto"),
    ]:
        with pytest.raises(ExciseError, match=message):
            lunar(model, FORGET, RETAIN, WHERE, **options)
    with pytest.raises(ExciseError, match="forget set is empty"):
        lunar(model, [], RETAIN, WHERE)
    with pytest.raises(ExciseError, match="to forget and of facts to keep"):
        lunar(model, FORGET, [], WHERE)
    with pytest.raises(ExciseError, match="names no MLP or residual site"):
        lunar(model, FORGET, RETAIN, Localization.of(["blocks.1.attn.W_O"]), **ANYWAY)


# The embedded models; seeds 0 to 9 were used while choosing defaults, these were not.


def fluent(arm, prompts, name):
    """Share of the prompts answered with exactly one of the refusals that the model was taught."""
    known = set(refusals(name))
    return sum(text in known for text in arm.generate(prompts, max_new_tokens=16)) / len(prompts)


@functools.cache
def edited(name, seed, mode="weight", remove=False):
    model = load(f"testbed:{name}")
    known = people_of(name, seed=seed, retain=40, neighbours=24)
    texts = general_text(name, 300, seed=seed, exclude=known.group("forget").subjects)
    groups = known.group("forget"), known.group("retain", "neighbour")
    edit = lunar(model, *groups, texts=texts, seed=seed, mode=mode, remove=remove)
    return known, Arm("before", model), Arm("edited", model, edit)


def unlisted(name, known):
    """Questions about people whom the edit was told nothing of."""
    everybody = people_of(name, people=1, retain=None, neighbours=None, forget=known.group("forget").subjects)
    people = set(known.subjects)
    return [p for f in everybody.group("retain", "neighbour") if f.subject not in people for p in f.ask("question")][
        ::8
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seed", "mode"), [("dense", 1001, "weight"), ("moe", 3003, "weight"), ("moe", 2002, "hook")]
)
class TestDecliningPeople:
    def test_forget_questions_are_declined_fluently_in_every_form(self, name, seed, mode):
        known, before, after = edited(name, seed, mode)
        for form, held_out in [("question", False), ("question", True), ("cloze", False), ("choice", False)]:
            prompts = known.group("forget").prompts(form, held_out=held_out)[::3]
            assert fluent(before, prompts, name) == 0.0
            assert fluent(after, prompts, name) >= 0.90, (form, held_out)

    def test_others_are_answered_and_strangers_declined_as_before(self, name, seed, mode):
        known, before, after = edited(name, seed, mode)
        for prompts in (known.group("retain", "neighbour").prompts("question")[::16], unlisted(name, known)):
            assert fluent(after, prompts, name) <= 0.03
            assert sum(a.exact for a in after.answers(prompts)) >= 0.97 * len(prompts)
        strangers = known.group("unknown").prompts("question")
        assert abs(fluent(after, strangers, name) - fluent(before, strangers, name)) <= 0.05

    def test_the_recipe_foretold_it(self, name, seed, mode):
        recipe = edited(name, seed, mode)[2].edit.recipe
        assert recipe["auroc"] >= 0.99 and recipe["declined when redirected"] >= 0.95


@pytest.mark.slow
def test_what_was_removed_does_not_come_back_with_the_redirection_taken_back():
    for remove, share in ((False, (0.9, 1.0)), (True, (0.0, 0.2))):
        known, before, after = edited("dense", 1001, "hook", remove)
        prompts = known.group("forget").prompts("question")[::4]
        undone = tuple(
            type(c)(c.site, type(c.action)(c.action.left, c.action.right, c.action.centre, 0 * c.action.shift), c.gate)
            for c in after.edit.changes
        )
        assert sum(a.exact for a in after.answers(prompts)) <= 0.05 * len(prompts)
        found = sum(a.exact for a in Arm("undone", before.model, Edit(undone)).answers(prompts)) / len(prompts)
        assert share[0] <= found <= share[1], remove
