"""The decision of the tuner, with a fake clock and candidates that are wrong, slow, broken or merely as good."""

import math
import warnings

import pytest
import torch

from fastres.contest import TIE, Candidate, decide, rounds_of, rule

VALUE = torch.linspace(-2, 2, 64).view(4, 16)


class FakeTimer:
    """Milliseconds by name; remembers whom it was asked about."""

    def __init__(self, **ms: float) -> None:
        self.ms, self.asked = ms, []

    def __call__(self, runs):
        self.asked = list(runs)
        return {name: self.ms[name] for name in runs if name in self.ms}


def constant(name, value=VALUE):
    return Candidate(name, lambda: [value])


def decided(timer, *candidates, judge=None, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decision = decide(candidates, judge or rule(torch.float32), timer, **options)
    return decision, [str(w.message) for w in caught]


def test_the_fastest_that_agrees_wins():
    timer = FakeTimer(library=3.0, triton=2.0, cuda=2.5)
    decision, said = decided(timer, constant("library"), constant("triton"), constant("cuda"))
    assert decision.choice == "triton" and decision.ms == timer.ms and not decision.dropped and not said
    assert timer.asked == ["library", "triton", "cuda"]


@pytest.mark.parametrize(
    "ms, choice", [(1 - TIE / 2, "library"), (1.0, "library"), (2.0, "library"), (1 - 2 * TIE, "triton")]
)
def test_the_library_wins_ties(ms, choice):
    assert decided(FakeTimer(library=1.0, triton=ms), constant("library"), constant("triton"))[0].choice == choice


def broken(name):
    def run():
        raise RuntimeError("out of   resource:\nshared memory")

    return Candidate(name, run)


def nan(name):
    value = VALUE.clone()
    value[1, 3] = math.nan
    return constant(name, value)


WRONG = {
    "one element wrong": (
        lambda: constant("triton", torch.where(VALUE[0, 0] == VALUE, VALUE + 0.1, VALUE)),
        "differs in result 0",
    ),
    "everything a little wrong": (lambda: constant("triton", VALUE * (1 + 1e-4)), "differs in result 0"),
    "a NaN": (lambda: nan("triton"), "1 NaNs"),
    "infinite": (lambda: constant("triton", VALUE / 0), "other infinities"),
    "another shape": (lambda: constant("triton", VALUE[:3]), "expected torch.float32 [4, 16]"),
    "another dtype": (lambda: constant("triton", VALUE.half()), "torch.float16"),
    "a result too few": (lambda: Candidate("triton", lambda: []), "gave 0 results, expected 1"),
    "raises": (lambda: broken("triton"), "raised RuntimeError: out of resource: shared memory"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_candidate_is_dropped_and_named(case):
    make, why = WRONG[case]
    timer = FakeTimer(library=3.0, triton=0.001, cuda=2.0)
    decision, said = decided(timer, constant("library"), make(), constant("cuda"), what="conv_stats 8x64x56x56")
    assert decision.choice == "cuda" and list(decision.dropped) == ["triton"]
    assert any(part in decision.dropped["triton"] for part in why.split("|"))
    assert len(said) == 1 and "triton" in said[0] and "conv_stats 8x64x56x56" in said[0]
    assert "triton" not in timer.asked, "what is wrong is not timed"


def test_only_the_library_left_is_not_timed():
    timer = FakeTimer()
    decision, _ = decided(timer, constant("library"), broken("triton"))
    assert decision.choice == "library" and not timer.asked and not decision.ms


def test_errors_of_the_library_are_errors():
    with pytest.raises(RuntimeError, match="shared memory"):
        decide([broken("library"), constant("triton")], rule(torch.float32), FakeTimer())
    with pytest.raises(ValueError, match="nothing to choose"):
        decide([], rule(torch.float32), FakeTimer())


@pytest.mark.parametrize("ms", [math.nan, math.inf, None])
def test_what_could_not_be_timed_is_dropped(ms):
    times = {"library": 2.0, "triton": ms, "cuda": 1.0}
    timer = FakeTimer(**{k: v for k, v in times.items() if v is not None})
    decision, said = decided(timer, constant("library"), constant("triton"), constant("cuda"))
    assert decision.choice == "cuda" and decision.dropped == {"triton": "could not be timed"} and "triton" in said[0]


def test_a_library_without_a_time_keeps_no_one_back():
    decision, _ = decided(FakeTimer(triton=1.0), constant("library"), constant("triton"))
    assert decision.choice == "triton"


def test_the_rule_allows_twice_the_librarys_error():
    truth = [VALUE.double()]
    library = (VALUE * (1 + 1e-3)).half()
    for factor, passes in ((1 - 1e-3, True), (1 + 1.5e-3, True), (1 + 4e-3, False), (1 + 2e-2, False)):
        why = rule(torch.float16, truth)([(VALUE * factor).half()], [library])
        assert (why is None) == passes, why
    judge, same = rule(torch.float32), torch.tensor([1.0, math.nan, math.inf])
    assert judge([same], [same.clone()]) is None and judge([torch.empty(0)], [torch.empty(0)]) is None
    assert judge([torch.zeros(3)], [torch.zeros(3)]) is None and judge([torch.ones(3)], [torch.zeros(3)]) is not None


def test_turns_and_medians():
    order, clocks = [], {"a": iter([9.0, 1.0, 2.0]), "b": iter([3.0, math.nan, 3.0]), "c": iter([1.0, 1.0])}

    def clock(run):
        order.append(name := run())
        return next(clocks[name])  # c has no third time: it raises

    times = rounds_of(clock, 3)({name: (lambda name=name: name) for name in clocks})
    assert times == {"a": 2.0} and order == ["a", "b", "c"] * 3


def test_one_wrong_element_among_many_in_16_bits():
    """Of a million elements the norm does not see one, the largest difference does."""
    map_ = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    wrong = map_.clone()
    wrong[-1, -1] = 0.0 if map_[-1, -1].abs() > 1 else 3.0
    judge = rule(torch.bfloat16)
    assert judge([map_], [map_]) is None and "max" in judge([wrong], [map_])
    shifted = (map_.float() * 1.01).bfloat16()
    assert "L2" in judge([shifted], [map_])
