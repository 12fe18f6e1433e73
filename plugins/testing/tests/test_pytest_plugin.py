"""`pytest --unspool-check`: items without a test file, and nothing at all while the option is not used."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest_plugins = "pytester"
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestAssertRewriteWarning")


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-v", *arguments)


def test_each_law_becomes_an_item(pytester: pytest.Pytester, few_laws: object) -> None:
    result = run(pytester, "--unspool-check", "kit_greedy", "--unspool-check", "kit_sample")
    result.assert_outcomes(passed=4, failed=2)
    for plugin in ("kit_greedy", "kit_sample"):
        result.stdout.fnmatch_lines([f"*unspool-check[[]{plugin}]::{law} *" for law in ("holds", "breaks")])
    text = result.stdout.str()
    assert "\nbreaks: What breaks says.\n\nit gave 3, not 4\n" in text
    assert "def runtest" not in text
    assert "is_about_others" not in text


def test_without_a_path_nothing_else_runs(pytester: pytest.Pytester, few_laws: object) -> None:
    pytester.makeini("[pytest]\ntestpaths = .")
    pytester.makepyfile("def test_other():\n    pass\n")
    run(pytester, "--unspool-check=kit_greedy").assert_outcomes(passed=2, failed=1)
    run(pytester, "--unspool-check=kit_greedy", ".").assert_outcomes(passed=3, failed=1)
    run(pytester).assert_outcomes(passed=1)


def test_items_are_chosen_by_keyword(pytester: pytest.Pytester, few_laws: object) -> None:
    run(pytester, "--unspool-check=kit_greedy", "-k", "holds_too").assert_outcomes(passed=1, deselected=2)
    listed = run(pytester, "--unspool-check=kit_greedy", "--collect-only", "-qq")
    listed.stdout.fnmatch_lines(["unspool-check[[]kit_greedy[]]*"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--unspool-check=gredy"], "*no plugin 'gredy': did you mean 'greedy'*"),
        (["--unspool-check=no_module:Nobody"], "*cannot import it: ModuleNotFoundError*"),
        (["--unspool-check=kit_greedy", "--unspool-examples=0"], "*--unspool-examples 0: at least 1*"),
    ],
)
def test_a_wrong_option_is_a_usage_error(pytester: pytest.Pytester, arguments: list[str], message: str) -> None:
    result = run(pytester, *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_it_costs_other_runs_nothing() -> None:
    code = (
        "import sys, unspool_testing.pytest_plugin\n"
        "heavy = {'torch', 'transformers', 'hypothesis', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_xdist_shares_the_laws_out(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess("-n2", "--unspool-check=kit_greedy", "--unspool-examples=1", "-v")
    result.stdout.fnmatch_lines(["*2 workers*"])
    assert result.ret == 0
    assert {"[gw0]", "[gw1]"} <= set(result.stdout.str().split())
