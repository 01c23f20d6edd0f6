"""Build the page of a report, block by block, from the dictionary that report.json holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stream_ctr.paper import published
from stream_ctr.paper.aggregate import STUDIES, Report
from stream_ctr.paper.findings import findings
from stream_ctr.paper.page import Block, Code, Details, Facts, Heading, Listing, Note, Text
from stream_ctr.paper.studies import figure6, study
from stream_ctr.paper.tables import one_seed, streaming, table1, table2
from stream_ctr.paper.words import as_text, count, duration, number, percent


def contents(report: Report) -> list[Block]:
    """Return the blocks of the page. The dictionary alone decides them."""
    studies = [block for part in STUDIES for block in study(report, part)]
    return [
        *_head(report),
        *table2(report),
        *table1(report),
        *figure6(report),
        *studies,
        *streaming(report),
        *_missing(report),
        *_method(report),
    ]


def title(report: Report) -> str:
    """Return the title of the page."""
    return f"The DeepFM paper, repeated on {report['data']['name']}"


# -- data, settings, machine ---------------------------------------------------------------------


def _head(report: Report) -> list[Block]:
    made = report["made"]
    settings = [
        (str(name).replace("_", " "), as_text(value)) for name, value in report["settings"].items()
    ]
    return [
        Heading(title(report), 1),
        Text(
            "Tables 1 and 2 and Figures 6 to 11 of the DeepFM paper, measured again. All systems "
            "use the same hashed features, the same split and the same test examples. The paper's "
            "own numbers stand in separate columns."
        ),
        Text(f"The paper: {published.SOURCE}"),
        *(Note(text) for text in _notes(report)),
        Heading("Results"),
        *findings(report),
        Heading("Data, settings, machine"),
        Facts([*_data(report["data"]), *_made(report)]),
        Details("All settings", [Facts(settings)]),
        Text("The command:"),
        Code(made["command"]),
    ]


_QUICK = (
    "This is a quick run (--quick) with the settings below. It shows that everything works, but it "
    "is too short to draw conclusions from."
)

_OTHER_DROPOUT = (
    "Table 2 uses a dropout of {:g}, which was set by hand; the paper uses {:g}. If test scores "
    "suggested the value, the scores in Table 2 are optimistic. Choose the dropout by the "
    "validation "
    "loglosses of Figure 8."
)

_SIMULATED = (
    "The log is simulated. The paper's second data set, Company*, is private. This log takes its "
    "place, but its data is different. In a simulated log the true probability of every click is "
    "known, and therefore the best possible logloss."
)


def _notes(report: Report) -> Iterator[str]:
    data = report["data"]
    if report["made"]["quick"]:
        yield _QUICK
    if data["whole"]:
        yield data["whole"]
    dropout = report["settings"]["dropout"]
    if dropout != published.DROPOUT:
        yield _OTHER_DROPOUT.format(dropout, published.DROPOUT)
    if data["simulated"] is not None:
        yield _SIMULATED


_SPLITS = {
    "random": "random, the same for all runs",
    "time": "by time, with the latest examples as the test part",
}


def _data(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield (
        "Data",
        f"{data['name']} ({data['format']}): {count(data['impressions'])} impressions, "
        f"{count(data['clicks'])} clicks, CTR {percent(data['ctr'])}",
    )
    crosses = data["crosses"] or "none, so that part uses single features only"
    yield (
        "Fields",
        f"{data['fields']} fields ({count(data['categorical'])} categorical, "
        f"{count(data['numeric'])} numeric); cross products for the wide part of LR & DNN: "
        f"{crosses}",
    )
    if data["numeric_encoding"]:
        yield "Numeric fields", data["numeric_encoding"]
    yield (
        "Split",
        f"{_SPLITS[data['split']]}: {count(data['train'])} examples for training, "
        f"{count(data['validation'])} for validation, {count(data['test'])} for testing",
    )
    for term, key in (
        ("Logloss of the best constant", "constant_logloss"),
        ("Best possible logloss", "best_possible_logloss"),
    ):
        if data[key] is not None:
            yield term, f"{number(data[key], 5)} on the test part"
    for note in data["notes"]:
        yield "Note", f"{note[:1].upper()}{note[1:].rstrip('.')}"


_PAPER_SETTINGS = (
    f"dropout {published.DROPOUT}; network {'-'.join(map(str, published.HIDDEN))}; Adam, and FTRL "
    f"for LR; {published.ACTIVATION}, {published.ACTIVATION_IPNN} for IPNN; K = {published.K} for "
    "FM (section 3.1, Criteo)"
)


def _made(report: Report) -> Iterator[tuple[str, str]]:
    made = report["made"]
    settings = report["settings"]
    machines = report["machines"]
    yield "Settings", "; ".join(text(settings[name]) for name, text in _SETTING_TEXTS.items())
    yield "The paper's settings", _PAPER_SETTINGS
    no_spread = "; one seed has no spread" if one_seed(report) else ""
    yield (
        "Seeds",
        f"{made['seeds']} for Table 2, {made['study_seeds']} for Figures 7 to 11{no_spread}",
    )
    for machine in machines:
        yield "Machine", _machine(machine, several=len(machines) > 1)
    if made["accelerator"]:
        yield "Networks trained on", made["accelerator"]
    yield "Total time", f"{duration(made['seconds_total'])} for all runs"


def _machine(found: Mapping[str, Any], *, several: bool) -> str:
    machine = found["machine"]
    runs = f"; {count(found['runs'])} points of the tables and figures" if several else ""
    return (
        f"{machine['processor']}, {machine['cores']} cores; stream-ctr {found['version']}, "
        f"torch {found['torch']}{runs}"
    )


def _optimizer_text(name: str) -> str:
    lazy = name == "adam"
    return "lazy Adam (only the rows in a batch take a step)" if lazy else name


_SETTING_TEXTS: Mapping[str, Callable[[Any], str]] = {
    "dropout": lambda share: f"dropout {share:g}",
    "hidden": lambda widths: f"network {'-'.join(map(str, widths))}",
    "embedding_dim": lambda width: f"K = {width}",
    "table_bits": lambda bits: f"an embedding table of 2^{bits} = {count(2**bits)} rows",
    "table_optimizer": lambda name: f"table optimizer {_optimizer_text(name)}",
    "dense_learning_rate": lambda rate: f"network optimizer Adam, learning rate {rate:g}",
    "ftrl": lambda rates: f"LR optimizer FTRL, {as_text(rates)}",
    "batch_size": lambda size: f"batches of {count(size)}",
    "epochs": lambda most: f"at most {most} {'epoch' if most == 1 else 'epochs'}",
    "precision": lambda name: f"precision {name}",
}


# -- missing results and method ------------------------------------------------------------------


def _missing(report: Report) -> list[Block]:
    if not report["missing"] and not report["failed"]:
        return []
    failed = [
        f"Failed: {run['system']}, {_point(run)}, seed {run['seed']}: {run['error']}"
        for run in report["failed"]
    ]
    return [Heading("Missing results"), Listing([*failed, *report["missing"]])]


def _point(run: Mapping[str, Any]) -> str:
    varies = run["value"] and run["part"] in STUDIES
    return f"{run['part']} at {run['value']}" if varies else str(run["part"])


_TRAINING = (
    "Training: every epoch uses a different order. The data is shuffled as a whole, or in chunks "
    "of half a gigabyte when it is larger than that. The validation logloss is measured four times "
    "per epoch. Training stops after four checks in a row without improvement, and the weights of "
    "the best check are tested. The test part takes no part in any choice made here. It does when "
    "someone picks a setting by the test scores of a report and runs again."
)

_TUNING = (
    "Tuning: LR's default rates were close to the best of a grid on samples of Criteo and Avazu "
    "and on a simulated stream. The networks' defaults are the paper's settings and Adam's usual "
    "learning rate; they were not tuned."
)

_INTERVAL = (
    "A difference is the mean test loss of one system minus that of another on the same examples, "
    "averaged over the seeds that both have. Its 95 % interval covers two sources of chance: which "
    "examples are in the test part (a bootstrap over blocks of neighbouring examples), and the "
    "random numbers that a training starts from (the spread of the difference over seeds, by "
    "Student's t with one degree of freedom fewer than there are seeds). "
)

_ONE_SEED = (
    "With one seed the interval covers the first source only; another seed may give another order."
)

_FEW_SEEDS = "Few seeds estimate that spread poorly; Student's t widens the interval accordingly."

_NOT_COVERED = (
    "The interval does not cover other training data or other hyper-parameters. When eight "
    "intervals stand side by side, at least one excludes zero in up to a third of such reports, "
    "even if all systems are equally good."
)


def _method(report: Report) -> list[Block]:
    return [
        Heading("Method"),
        Text(_TRAINING),
        Text(_TUNING),
        Heading("How to read the intervals"),
        Text(_INTERVAL + (_ONE_SEED if one_seed(report) else _FEW_SEEDS)),
        Text(_NOT_COVERED),
    ]
