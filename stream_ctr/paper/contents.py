"""What the page of a report says, block by block: everything is in the report's dictionary, which is report.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stream_ctr.paper import published
from stream_ctr.paper.aggregate import STUDIES, Report
from stream_ctr.paper.findings import findings
from stream_ctr.paper.page import Block, Code, Details, Facts, Heading, Listing, Note, Text
from stream_ctr.paper.studies import figure6, study
from stream_ctr.paper.tables import one_seed, streaming, table1, table2
from stream_ctr.paper.words import count, duration, number, percent, plain


def contents(told: Report) -> list[Block]:
    """The page of a report, from the dictionary alone."""
    studies = [block for part in STUDIES for block in study(told, part)]
    return [
        *_head(told),
        *table2(told),
        *table1(told),
        *figure6(told),
        *studies,
        *streaming(told),
        *_absent(told),
        *_method(told),
    ]


def title(told: Report) -> str:
    return f"The DeepFM paper, repeated on {told['data']['name']}"


def _head(told: Report) -> list[Block]:
    data, made = told["data"], told["made"]
    blocks: list[Block] = [
        Heading(title(told), 1),
        Text(
            "Table 1, Table 2 and Figures 6 to 11 of the DeepFM paper, measured again: its systems, on the same hashed features, "
            "the same split and the same test examples. Numbers of the paper itself are in columns of their own."
        ),
        Text(f"The paper: {published.SOURCE}"),
    ]
    if made["quick"]:
        blocks.append(
            Note(
                "A quick run (--quick), with the settings below: it shows that everything works. It is too short for a verdict."
            )
        )
    if data["whole"]:
        blocks.append(Note(data["whole"]))
    if (dropped := told["settings"]["dropout"]) != published.DROPOUT:
        blocks.append(Note(_DROPOUT_GIVEN.format(dropped, published.DROPOUT)))
    if data["simulated"] is not None:
        blocks.append(Note(_SIMULATED))
    blocks += [
        Heading("What came out"),
        *findings(told),
        Heading("Data, settings, machine"),
        Facts([*_data(data), *_made(told)]),
    ]
    settings = Facts([(_words(name), plain(value)) for name, value in told["settings"].items()])
    return [
        *blocks,
        Details("All settings", [settings]),
        Text("The command:"),
        Code(made["command"]),
    ]


_DROPOUT_GIVEN = (
    "The dropout of Table 2, {:g}, was given by hand; the paper's is {:g}. If test scores suggested it, Table 2 flatters it: choose by the "
    "validation loglosses of Figure 8."
)


_SIMULATED = (
    "The log is simulated. The paper's second data set, Company*, is private; this log takes its place and is not that data. What it has "
    "in exchange: the true probability of every click is known, and with it the best possible logloss."
)


def _data(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    counted = f"{count(data['impressions'])} impressions, {count(data['clicks'])} clicks, CTR {percent(data['ctr'])}"
    yield "Data", f"{data['name']} ({data['format']}): {counted}"
    fields = f"{data['fields']} fields ({count(data['categorical'])} categorical, {count(data['numeric'])} numeric)"
    crosses = data["crosses"] or "none, so it has single features only"
    yield "Fields", f"{fields}; cross products for the wide part of LR & DNN: {crosses}"
    if data["numeric_encoding"]:
        yield "Numbers", data["numeric_encoding"]
    how = {"random": "at random, the same for all", "time": "by time, the last are the test part"}[
        data["split"]
    ]
    validation = f"{count(data['validation'])} for validation"
    yield (
        "Split",
        f"{how}: {count(data['train'])} examples to train, {validation}, {count(data['test'])} to test",
    )
    if data["constant_logloss"] is not None:
        yield (
            "Logloss of the best constant",
            f"{number(data['constant_logloss'], 5)} on the test part",
        )
    if data["best_possible_logloss"] is not None:
        yield (
            "Best possible logloss",
            f"{number(data['best_possible_logloss'], 5)} on the test part",
        )
    for note in data["notes"]:
        yield "Note", f"{note[:1].upper()}{note[1:].rstrip('.')}"


def _made(told: Report) -> Iterator[tuple[str, str]]:
    made, settings = told["made"], told["settings"]
    yield "Settings", "; ".join(says(settings[name]) for name, says in _USUAL.items())
    yield (
        "The paper's settings",
        (
            f"dropout {published.DROPOUT}; network {'-'.join(map(str, published.HIDDEN))}; Adam, and FTRL for LR; {published.ACTIVATION}, "
            f"{published.ACTIVATION_IPNN} for IPNN; K = {published.K} for FM (section 3.1, Criteo)"
        ),
    )
    alone = "; with one seed there is no spread to report" if one_seed(told) else ""
    yield "Seeds", f"{made['seeds']} for Table 2, {made['study_seeds']} for Figures 7 to 11{alone}"
    for where in told["machines"]:
        yield "Machine", _machine(where, several=len(told["machines"]) > 1)
    if made["accelerator"]:
        yield "Networks on", made["accelerator"]
    yield "Took", f"{duration(made['seconds_total'])} for all runs"


def _machine(where: Mapping[str, Any], *, several: bool) -> str:
    machine = where["machine"]
    runs = f"; {count(where['runs'])} points of the tables and figures" if several else ""
    return f"{machine['processor']}, {machine['cores']} cores; stream-ctr {where['version']}, torch {where['torch']}{runs}"


_USUAL: Mapping[str, Callable[[Any], str]] = {
    "dropout": lambda share: f"dropout {share:g}",
    "hidden": lambda widths: f"network {'-'.join(map(str, widths))}",
    "embedding_dim": lambda width: f"K = {width}",
    "table_bits": lambda bits: f"an embedding table of 2^{bits} = {count(2**bits)} rows",
    "table_optimizer": lambda name: (
        f"table by {'lazy Adam (only the rows of a batch step)' if name == 'adam' else name}"
    ),
    "dense_learning_rate": lambda rate: f"network by Adam, rate {rate:g}",
    "ftrl": lambda rates: f"LR by FTRL, {plain(rates)}",
    "batch_size": lambda size: f"batches of {count(size)}",
    "epochs": lambda most: f"at most {most} {'epoch' if most == 1 else 'epochs'}",
    "precision": lambda name: f"precision {name}",
}


def _words(name: object) -> str:
    return str(name).replace("_", " ")


def _absent(told: Report) -> list[Block]:
    if not told["missing"] and not told["failed"]:
        return []
    failed = [
        f"Failed: {of['system']}, {_place(of)}, seed {of['seed']}: {of['error']}"
        for of in told["failed"]
    ]
    return [Heading("What is missing"), Listing([*failed, *told["missing"]])]


def _place(of: Mapping[str, Any]) -> str:
    return (
        f"{of['part']} at {of['value']}"
        if of["value"] and of["part"] in STUDIES
        else str(of["part"])
    )


def _method(told: Report) -> list[Block]:
    spread = (
        "With one seed the interval holds the first kind of chance only; another seed may well give another order."
        if one_seed(told)
        else "So few seeds are themselves uncertain; Student's t makes the interval as wide as that demands."
    )
    return [
        Heading("How it was done"),
        Text(
            "Training: each epoch has an order of its own, shuffled as a whole or, of data above half a gigabyte, in parts of that size. "
            "Four times an epoch the logloss of the validation part is taken; four checks in a row that are no better end a training, and "
            "the weights of the best check are tested. The test part chooses nothing here. It does where somebody picks a setting by the "
            "test scores of a report and runs again."
        ),
        Text(
            "Tuning: LR's default rates were close to the best of a grid on samples of Criteo and Avazu and on a simulated stream. The "
            "networks' defaults are the paper's settings and Adam's usual rate, not tuned."
        ),
        Heading("How to read the intervals"),
        Text(
            "A difference is a system's mean loss on the test examples less another's on the same examples, averaged over the seeds that "
            "both have. Its 95 % interval is for two kinds of chance: which examples are in the test part (a bootstrap over blocks of "
            "neighbouring examples), and which numbers a training began with (the spread of the difference over seeds, by Student's t "
            f"with one degree of freedom less than there are seeds). {spread}"
        ),
        Text(
            "It does not hold what another training part or other hyper-parameters would change. Where eight intervals stand side by side, "
            "even if all systems were equally good, at least one would leave zero out in up to a third of such reports."
        ),
    ]
