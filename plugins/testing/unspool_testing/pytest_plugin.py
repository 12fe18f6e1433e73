"""`pytest --unspool-check NAME`: the laws about installed plugins as test items, without a test file.

pytest loads this module in every run, so it imports nothing else of the kit before the option is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from unspool_testing.parametrize import LawOfPlugin
    from unspool_testing.subject import Subject

_SUBJECTS = pytest.StashKey[list[tuple[str, "Subject"]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("unspool", "laws of Unspool's plugins")
    group.addoption(
        "--unspool-check",
        action="append",
        default=[],
        metavar="NAME",
        help="Prove the laws on this plugin: an installed one, or module:Class. Repeat for more. "
        "Where no test path is given, nothing else runs.",
    )
    group.addoption(
        "--unspool-examples",
        type=int,
        metavar="N",
        help="How many cases are tried of each law, where a test does not say so itself.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Find the plugins that are named, before anything is collected."""
    examples = config.option.unspool_examples
    if examples is not None and examples < 1:
        raise pytest.UsageError(f"--unspool-examples {examples}: at least 1")
    names: list[str] = list(dict.fromkeys(config.option.unspool_check))
    if not names:
        return
    from unspool.errors import UnspoolError
    from unspool_testing.subject import Subject

    try:
        config.stash[_SUBJECTS] = [(name, Subject.find(name)) for name in names]
    except UnspoolError as error:
        raise pytest.UsageError(f"--unspool-check: {error}") from error
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []  # pytest's choice for want of a path


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add an item for each law, where -k and its like still see them."""
    for name, subject in config.stash.get(_SUBJECTS, []):
        checked = Check.from_parent(session, name=f"unspool-check[{name}]", subject=subject)
        items.extend(checked.collect())
    if config.option.unspool_examples is not None:
        _set_examples(items, config.option.unspool_examples)


def _set_examples(items: list[pytest.Item], examples: int) -> None:
    """Have the tests of `parametrize_with_laws` try so many cases, where they do not say so themselves."""
    from dataclasses import replace

    from unspool_testing.parametrize import LawOfPlugin

    for item in items:
        given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if isinstance(law := given.get("law"), LawOfPlugin) and law.examples is None:
            given["law"] = replace(law, examples=examples)


class Check(pytest.Collector):
    """The laws about one plugin."""

    def __init__(self, *, name: str, subject: Subject, **context: Any) -> None:
        super().__init__(name, nodeid=name, **context)
        self.subject = subject

    def collect(self) -> Iterator[LawItem]:
        """Give an item for each law that says something about it."""
        from unspool_testing.expected import laws_of
        from unspool_testing.parametrize import LawOfPlugin

        for law in laws_of(self.subject):
            to_prove = LawOfPlugin(law, self.subject, self.config.option.unspool_examples)
            yield LawItem.from_parent(self, name=law.name, law=to_prove)


class LawItem(pytest.Item):
    """One law about one plugin."""

    def __init__(self, *, law: LawOfPlugin, **context: Any) -> None:
        super().__init__(**context)
        self.law = law

    def runtest(self) -> None:
        """Prove it."""
        self.law()

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Say what it is called in reports."""
        return self.path, None, self.nodeid
