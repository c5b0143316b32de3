"""All comparisons with their verdicts, each counted once, although several tables make some of them."""

import dataclasses
from collections.abc import Mapping, Sequence

from launch.miniature import experiments, markdown, tables, verdicts
from launch.miniature.finished import Runs
from launch.miniature.style import label_of
from launch.miniature.verdicts import AGREES, DISAGREES, DIVERGED, NOT_RUN, OUTCOMES, UNDECIDED, Verdict


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A claim that a table makes, and what the runs say about it."""

    verdict: Verdict
    counted_in: str = ""  # name of the earlier table that compares the same runs by the same measure; '' if counted here

    @property
    def claim(self) -> tables.Claim:
        """The claim."""
        return self.verdict.claim


Comparisons = Mapping[str, Sequence[Comparison]]  # by table


def compare(runs_of: Runs) -> dict[str, list[Comparison]]:
    """Judges the claims of all tables."""
    first_in: dict[tuple[str, str, str, bool], str] = {}
    compared = {}
    for name, table in experiments.TABLES.items():
        compared[name] = []
        for claim in table.claims:
            earlier = first_in.setdefault((claim.first, claim.second, claim.measure, claim.alike), name)
            compared[name].append(Comparison(verdicts.judge(claim, runs_of), "" if earlier == name else earlier))
    return compared


def is_shown(name: str, compared: Comparisons, runs_of: Runs) -> bool:
    """Returns True if a table has something of its own to show: a claim that was judged here, or a run of every row."""
    own = any(one.verdict.outcome != NOT_RUN and not one.counted_in for one in compared[name])
    return own or all(runs_of.get(setting) for setting in experiments.TABLES[name].rows)


def relation(claim: tables.Claim) -> str:
    """Returns a claim as a formula in words: measure, first, relation, second."""
    measure = tables.MEASURES[claim.measure]
    sign = "≈" if claim.alike else ">" if measure.more_is_better else "<"
    return f"{measure.title} of “{label_of(claim.first)}” {sign} “{label_of(claim.second)}”"


def counts(compared: Comparisons, one_of_them: str = "published comparison") -> str:
    """Returns the numbers of verdicts in a sentence."""
    outcomes = [one.verdict.outcome for of_table in compared.values() for one in of_table if not one.counted_in]
    words = {
        AGREES: ("comes out as published", "come out as published"), UNDECIDED: ("is undecided", "are undecided"),
        DISAGREES: ("comes out the other way", "come out the other way"), DIVERGED: ("diverged on both sides",) * 2,
        NOT_RUN: ("has not run", "have not run"),
    }  # fmt: skip
    if not any(outcome != NOT_RUN for outcome in outcomes):
        return f"No {one_of_them} has run."
    found = [(outcomes.count(outcome), words[outcome]) for outcome in OUTCOMES if outcome in outcomes]
    parts = [f"{count} {one if count == 1 else several}" for count, (one, several) in found]
    return f"Of {len(outcomes)} {one_of_them}{'s' * (len(outcomes) > 1)} {markdown.listed(parts)}."


def overview(compared: Comparisons, shown: Sequence[str]) -> list[str]:
    """Returns the lines of a table with the numbers of verdicts of every experiment that is shown."""
    rows = []
    for name in shown:
        own = [one.verdict.outcome for one in compared[name] if not one.counted_in]
        numbers = [own.count(outcome) for outcome in (AGREES, UNDECIDED, DISAGREES)]
        numbers += [len(own) - sum(numbers), len(compared[name]) - len(own)]
        rows.append([markdown.link(experiments.TABLES[name].title), *map(str, numbers)])
    header = ["experiment", "as published", "undecided", "the other way", "diverged or not run", "counted above already"]
    return markdown.table(header, rows) if rows else []


def summary(compared: Comparisons, shown: Sequence[str]) -> str:
    """Returns all comparisons of some tables that have run as Markdown, and names those that have not."""
    rows, waiting = [], []
    for name in shown:
        for one in compared[name]:
            if one.verdict.outcome == NOT_RUN:
                waiting.append(relation(one.claim))
                continue
            numbers = one.claim.published or "–", one.verdict.values, one.verdict.difference or "–"
            rows.append([experiments.TABLES[name].title, relation(one.claim), *numbers, outcome_of(one)])
    header = ["experiment", "published", "its numbers", "here", "difference [95 %]", "verdict"]
    lines = ["## All comparisons", "", *(markdown.table(header, rows) if rows else ["None has run."])]
    if waiting:
        lines += ["", markdown.wrapped(f"Not run yet, in experiments of this page: {'; '.join(waiting)}.")]
    if missing := [experiments.TABLES[name].title for name in compared if name not in shown]:
        lines += ["", markdown.wrapped(f"Experiments that have not run: {'; '.join(missing)}.")]
    return "\n".join(lines)


def outcome_of(one: Comparison) -> str:
    """Returns a verdict, in bold if it decides something, and the table that counts it if that is an earlier one."""
    outcome = one.verdict.outcome
    text = f"**{outcome}**" if outcome in (AGREES, DISAGREES, DIVERGED) else outcome
    return f"{text} (counted in “{experiments.TABLES[one.counted_in].title}”)" if one.counted_in else text
