"""The laws as parametrized tests: which there are, and what is printed when one is broken."""

from __future__ import annotations

import pytest

from unspool.errors import ConfigError, InputError
from unspool_testing.parametrize import LawOfPlugin, parametrize_with_laws
from unspool_testing.subject import Subject

pytest_plugins = "pytester"
pytestmark = [
    pytest.mark.usefixtures("few_laws"),
    pytest.mark.filterwarnings("ignore::pytest.PytestAssertRewriteWarning"),
]


def run(pytester: pytest.Pytester, source: str, *arguments: str) -> pytest.RunResult:
    head = "from unspool_testing.parametrize import parametrize_with_laws\n"
    pytester.makepyfile(test_it=head + source)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments)


def test_there_is_a_test_for_each_law_that_applies(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@parametrize_with_laws("kit_greedy")
def test_greedy(law):
    law()
""",
        "-v",
    )
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        ["*::test_greedy[[]holds] PASSED*", "*::test_greedy[[]breaks] FAILED*", "*::test_greedy[[]holds_too] PASSED*"]
    )
    result.stdout.no_fnmatch_line("*is_about_others*")


def test_a_broken_law_prints_its_counterexample_and_no_internals(pytester: pytest.Pytester) -> None:
    result = run(pytester, '@parametrize_with_laws("kit_greedy")\ndef test_greedy(law):\n    law()\n')
    text = result.stdout.str()
    assert "\nbreaks: What breaks says.\n\nit gave 3, not 4\nand more\n" in text
    assert "\n    from unspool_testing import check_breaks\n" in text
    for internal in ("def __call__", "proof.py", "parametrize.py", "Falsifying"):
        assert internal not in text
    result.stdout.fnmatch_lines(["FAILED *[[]breaks] - LawBroken: breaks: What*"])


def test_an_expected_failure_is_strict_and_has_its_reason(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@parametrize_with_laws("kit_greedy", expected_failures={"breaks": "it cannot count", "holds": "by mistake"})
def test_greedy(law):
    law()
""",
        "-rx",
    )
    result.assert_outcomes(passed=1, xfailed=1, failed=1)
    result.stdout.fnmatch_lines(["*[[]XPASS(strict)[]] by mistake*", "XFAIL *[[]breaks] - it cannot count*"])


def test_a_fault_that_is_no_broken_law_is_never_expected(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@parametrize_with_laws("kit_greedy", expected_failures={"breaks": "it cannot count"})
def test_greedy(law):
    raise RuntimeError("out of luck")
""",
    )
    result.assert_outcomes(failed=3)


def test_the_number_of_examples_can_be_set_for_a_whole_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(LawOfPlugin, "__call__", lambda self: seen.append(self.examples))
    run(
        pytester,
        """
@parametrize_with_laws("kit_greedy")
def test_greedy(law):
    law()

@parametrize_with_laws("kit_greedy", examples=7)
def test_greedy_with_seven(law):
    law()
""",
        "--unspool-examples=2",
    )
    assert seen == [2, 2, 2, 7, 7, 7]


def test_a_broken_law_is_an_assertion_error_for_whoever_calls_it(few_laws: dict[str, object]) -> None:
    broken = parametrize_with_laws("kit_greedy").args[1][1].values[0]
    assert isinstance(broken, LawOfPlugin)
    assert repr(broken) == "breaks of kit_greedy"
    with pytest.raises(AssertionError, match="it gave 3, not 4"):
        broken()


def test_a_law_that_nobody_knows_is_an_error_that_names_the_laws() -> None:
    with pytest.raises(InputError, match=r"'braks': no such law: did you mean 'breaks'\? laws: holds, breaks, holds_"):
        parametrize_with_laws("kit_greedy", expected_failures={"braks": "why"})


def test_a_failure_of_a_law_that_does_not_apply_is_an_error_that_names_those_that_do() -> None:
    expected = r"it says nothing about kit_greedy \(it is no beam\): allowed: holds, breaks, holds_too"
    with pytest.raises(InputError, match=expected):
        parametrize_with_laws("kit_greedy", expected_failures={"is_about_others": "why"})


def test_a_failure_without_a_reason_is_an_error() -> None:
    with pytest.raises(InputError, match="with the reason why"):
        parametrize_with_laws("kit_greedy", expected_failures={"breaks": " "})


def test_a_plugin_that_nobody_knows_is_an_error_at_collection(pytester: pytest.Pytester) -> None:
    with pytest.raises(ConfigError, match="did you mean 'greedy'"):
        Subject.find("gredy")
    result = run(pytester, '@parametrize_with_laws("gredy")\ndef test_greedy(law):\n    law()\n')
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["E *no plugin 'gredy': did you mean 'greedy'*"])
