"""What the page of a report says, block by block: everything is in the report's dictionary, which is report.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from stream_ctr.paper import figures, published
from stream_ctr.paper.aggregate import DEEP, STUDIES, verdict
from stream_ctr.paper.page import Block, Cell, Code, Column, Details, Facts, Heading, Listing, Note, Picture, Strong, Table, Text

Report = Mapping[str, Any]
_NONE = "\N{EN DASH}"
_SUBJECT = {
    "figure7": "activation function",
    "figure8": "dropout",
    "figure9": "neurons per layer",
    "figure10": "hidden layers",
    "figure11": "network shape",
}


def contents(told: Report) -> list[Block]:
    """The page of a report, from the dictionary alone."""
    studies = [block for part in STUDIES for block in _study(told, part)]
    return [*_head(told), *_table2(told), *_table1(told), *_figure6(told), *studies, *_streaming(told), *_absent(told), *_method(told)]


def title(told: Report) -> str:
    return f"The DeepFM paper, repeated on {told['data']['name']}"


def _head(told: Report) -> list[Block]:
    data, made = told["data"], told["made"]
    blocks: list[Block] = [
        Heading(title(told), 1),
        Text(
            "Table 1, Table 2 and Figures 6 to 11 of the DeepFM paper, measured again: its nine systems, on the same hashed features, "
            "the same split and the same test examples. Numbers of the paper itself are in columns of their own."
        ),
        Text(f"The paper: {published.SOURCE}"),
    ]
    if made.get("quick"):
        blocks.append(
            Note("A quick run (--quick), with the settings below: it shows that everything works. It is too short for a verdict.")
        )
    if data.get("sample_of"):
        blocks.append(Note(f"The data is {data['sample_of'].rstrip('.')}. The paper's numbers are from the whole set."))
    if data.get("simulated") is not None:
        blocks.append(Note(_SIMULATED))
    blocks += [Heading("What came out"), *_findings(told), Heading("Data, settings, machine"), Facts([*_data(data), *_made(told)])]
    settings = Facts([(_words(name), _plain(value)) for name, value in told["settings"].items()])
    return [*blocks, Details("All settings", [settings]), Text("The command:"), Code(str(made["command"]))]


_SIMULATED = (
    "The log is simulated. The paper's second data set, Company*, is private; this log takes its place and is not that data. What it has "
    "in exchange: the true probability of every click is known, and with it the best possible logloss."
)


def _findings(told: Report) -> list[Block]:
    order = told["order"]
    if not order:
        return [Text("No run of Table 2 has ended.")]
    rows = told["table2"]
    scored = [f"{name} {_number(rows[name]['logloss'], 5)}" for name in order]
    said = [f"By test logloss, the lowest first: {', '.join(scored)}."]
    if (paper := _paper(told)) is not None:
        of = published.TABLE2[paper]
        said.append(f"The paper's order on {_short(paper)}: {', '.join(sorted(of, key=lambda name: of[name].logloss))}.")
    if "DeepFM" in order:
        said += _against(told)
    if "LR" in order and len(order) > 1:
        below = order[: order.index("LR")]
        said.append(f"A lower logloss than LR's: {', '.join(below) or 'none'}{' (all others)' if len(below) == len(order) - 1 else ''}.")
    constant = told["data"].get("constant_logloss")
    if constant is not None and (above := [name for name in order if rows[name]["logloss"] >= constant]):
        said.append(f"No better than a constant, whose test logloss is {_number(constant, 5)}: {', '.join(above)}.")
    if (best := told["data"].get("best_possible_logloss")) is not None:
        said.append(_closed(told, order[0], best))
    return [Listing([sentence for sentence in said if sentence])]


def _against(told: Report) -> list[str]:
    """Who is told apart from DeepFM by its interval, and who is not."""
    words = {
        "better": "Better than DeepFM, interval below zero",
        "worse": "Worse than DeepFM, interval above zero",
        "same": "Not told apart from DeepFM, interval around zero",
        "unknown": "Without an interval",
    }
    found = {kind: [name for name in told["order"] if told["against_deepfm"].get(name) == kind] for kind in words}
    return [f"{words[kind]}: {', '.join(names)}." for kind, names in found.items() if names]


def _closed(told: Report, first: str, best: float) -> str:
    lost, constant = told["table2"][first]["logloss"], told["data"].get("constant_logloss")
    said = f"The best possible test logloss is {_number(best, 5)}; {first} is {_number(lost - best, 5)} above it"
    if constant is None or constant <= best:
        return said + "."
    return said + f", and has {_percent((constant - lost) / (constant - best))} of what there is to learn beyond a constant."


def _data(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    counted = f"{_count(data['impressions'])} impressions, {_count(data['clicks'])} clicks, CTR {_percent(data['ctr'])}"
    yield "Data", f"{data['name']} ({data['format']}): {counted}"
    crosses = data.get("crosses")
    crosses = ", ".join(map(str, crosses)) if isinstance(crosses, list | tuple) else crosses
    fields = f"{data['fields']} fields ({_count(data['categorical'])} categorical, {_count(data['numeric'])} numeric)"
    yield "Fields", f"{fields}; cross products for the wide part of LR & DNN: {crosses or 'none'}"
    validation = f"{_count(data['validation'])} to choose the epoch, " if "validation" in data else ""
    how = _SPLITS.get(data["split"], str(data["split"]))
    yield "Split", f"{how}: {_count(data['train'])} examples to train, {validation}{_count(data['test'])} to test"
    if data.get("constant_logloss") is not None:
        yield "Logloss of a constant", f"{_number(data['constant_logloss'], 5)} on the test part"
    if data.get("best_possible_logloss") is not None:
        yield "Best possible logloss", f"{_number(data['best_possible_logloss'], 5)} on the test part"
    for note in data.get("notes", ()):
        yield "Note", f"{note[:1].upper()}{note[1:].rstrip('.')}"


_SPLITS = {"random": "at random, the same for all", "time": "by time, the last are the test part"}


def _made(told: Report) -> Iterator[tuple[str, str]]:
    made = told["made"]
    settings = told["settings"]
    yield "Settings", "; ".join(says(settings[name]) for name, says in _USUAL.items() if name in settings) or _NONE
    yield (
        "The paper's settings",
        (
            f"dropout {published.DROPOUT}; network {'-'.join(map(str, published.HIDDEN))}; Adam, and FTRL for LR; {published.ACTIVATION}, "
            f"{published.ACTIVATION_IPNN} for IPNN; K = {published.K} for FM (section 3.1, Criteo)"
        ),
    )
    figures_too = f" for Table 2, {_plain(made['study_seeds'])} for Figures 7 to 11" if "study_seeds" in made else ""
    yield "Seeds", f"{_plain(made.get('seeds'))}{figures_too}{'; with one seed there is no spread to report' if _one_seed(told) else ''}"
    if made.get("table_bits") is not None:
        yield "Embedding table", f"2^{made['table_bits']} = {_count(2 ** made['table_bits'])} rows"
    machine = made["machine"]
    yield (
        "Machine",
        f"{machine['processor']}, {machine['cores']} cores; networks on {made.get('accelerator') or _device(made.get('device', 'cpu'))}",
    )
    versions = {"stream-ctr": made.get("version"), "Python": made.get("python"), "torch": made.get("torch")}
    yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if made.get("seconds_total") is not None:
        yield "Took", _duration(made["seconds_total"])


_USUAL: Mapping[str, Callable[[Any], str]] = {
    "dropout": lambda share: f"dropout {share}",
    "hidden": lambda widths: f"network {'-'.join(map(str, widths))}",
    "embedding_dim": lambda width: f"K = {width}",
    "table_optimizer": lambda name: f"table by {name}",
    "batch_size": lambda size: f"batches of {_count(size)}",
    "epochs": lambda most: f"at most {most} epochs, the best on validation counts",
    "precision": lambda name: f"precision {name}",
}


def _words(name: object) -> str:
    return str(name).replace("_", " ")


def _one_seed(told: Report) -> bool:
    return max((row["runs"] for row in told["table2"].values()), default=0) <= 1


# -- tables -------------------------------------------------------------------------------------------------------------------------


def _table1(told: Report) -> list[Block]:
    columns = [Column("system", number=False), *(Column(name, number=False) for name in _TABLE1_COLUMNS), Column("source", number=False)]
    rows: list[list[Cell]] = []
    for name, of in told["table1"].items():
        marks = [not of["pretraining"], of["high_order"], of["low_order"], not of["engineering"]]
        rows.append([name, *("yes" if mark else _NONE for mark in marks), "the paper" if name in published.TABLE1 else "ours"])
    return [
        Heading("Table 1: properties of the systems"),
        Table("What each system does without, and what it learns.", columns, rows),
        Text(
            "The paper's rows are FNN, PNN (here its three variants), Wide & Deep (here LR & DNN) and DeepFM. The rows of LR, FM and "
            "FM & DNN are ours, by the same questions."
        ),
    ]


_TABLE1_COLUMNS = ("no pre-training", "high-order features", "low-order features", "no feature engineering")


def _paper(told: Report) -> str | None:
    """Which column of the paper's Table 2 belongs beside this data."""
    data = told["data"]
    return "criteo" if data["format"] == "criteo" else "company" if data.get("simulated") is not None else None


def _short(paper: str) -> str:
    return {"criteo": "Criteo", "company": "Company*"}[paper]


def _table2(told: Report) -> list[Block]:
    paper, best = _paper(told), told["data"].get("best_possible_logloss")
    here = "measured here"
    columns = [Column("system", number=False), Column("AUC", here), Column("logloss", here)]
    columns += [Column("above the best possible", here)] if best is not None else []
    if paper:
        columns += [Column(name, f"the paper, on {_short(paper)}", quoted=True) for name in ("AUC", "logloss")]
    columns += [Column("difference", "logloss less DeepFM's"), Column("95 % interval", "logloss less DeepFM's")]
    columns += [Column("seconds", "training"), Column("epochs", "training")]
    rows = [_table2_row(told, name, paper, best) for name in told["table2"]]
    blocks: list[Block] = [Heading("Table 2: performance"), Table(_table2_caption(told), columns, rows)]
    if paper:
        blocks.append(
            Text(f"The paper's numbers are of other data and another size ({published.DATA[paper]}): compare orders, not digits.")
        )
    else:
        blocks.append(Text("The paper has no numbers on this data."))
    if _compared(told):
        blocks.append(_differences(told))
    return blocks


def _table2_row(told: Report, name: str, paper: str | None, best: float | None) -> list[Cell]:
    row = told["table2"][name]
    if not row["runs"]:
        said: list[Cell] = ["missing", "missing"]
    else:
        said = [_best(told, row, name, "auc", 4), _best(told, row, name, "logloss", 5)]
    if best is not None:
        said.append(_number(None if row["logloss"] is None else row["logloss"] - best, 5))
    if paper:
        said += [f"{row['published'][paper]['auc']:.4f}", f"{row['published'][paper]['logloss']:.5f}"]
    said += _difference(row["minus_deepfm"]) if name != "DeepFM" else ["0", _NONE]
    return [name, *said, _number(row["seconds"], significant=3), _number(row["epochs"], significant=2)]


def _best(told: Report, row: Mapping[str, Any], name: str, metric: str, digits: int) -> Cell:
    """The mean and its spread; strong where no system's is better."""
    text = _spread(row[metric], row[f"{metric}_std"], digits)
    found = [of[metric] for of in told["table2"].values() if of[metric] is not None]
    first = found and row[metric] == (max(found) if metric == "auc" else min(found))
    return Strong(text) if first else text


def _table2_caption(told: Report) -> str:
    return (
        f"{_over_seeds(told)}, on {_count(told['data']['test'])} test examples. Seconds of training until the best epoch, FNN's "
        f"pre-training included, on {_device(told['made'].get('device', 'cpu'))}. The best AUC and logloss are set off, and differences "
        "whose interval leaves zero out."
    )


def _over_seeds(told: Report) -> str:
    return "One seed" if _one_seed(told) else "Mean \N{PLUS-MINUS SIGN} standard deviation over seeds"


def _difference(of: Mapping[str, Any] | None) -> list[Cell]:
    if of is None or of["logloss_difference"] is None:
        return [_NONE, _NONE]
    apart = verdict(of) in ("better", "worse")
    text = _signed(of["logloss_difference"])
    return [Strong(text) if apart else text, _NONE if of["low"] is None else f"{_signed(of['low'])} to {_signed(of['high'])}"]


def _compared(told: Report) -> dict[str, Mapping[str, float | None]]:
    return {name: row["minus_deepfm"] for name, row in told["table2"].items() if row["minus_deepfm"] is not None}


def _differences(told: Report) -> Picture:
    picture = figures.differences(_compared(told))
    caption = (
        "Test logloss less DeepFM's, with 95 % intervals. A hollow dot: the interval holds zero, so chance alone may be the difference."
    )
    return Picture("table2", caption, picture, [picture])


# -- figures ------------------------------------------------------------------------------------------------------------------------


def _figure6(told: Report) -> list[Block]:
    times, spent = told["figure6"], told["figure6_seconds"]
    blocks: list[Block] = [Heading("Figure 6: training time"), _claim("figure6")]
    if not times:
        return [*blocks, Note("Not run: there is no time of LR and of another system.")]
    caption = (
        "Training time over LR's, until the best epoch, FNN's pre-training included; the axis goes by powers of ten. LR is FTRL-Proximal "
        "in compiled code on one CPU core"
    )
    caption += (
        ", in the GPU's panel too: it has no GPU code." if "cuda" in times else ". No GPU was used." if set(times) == {"cpu"} else "."
    )
    devices = list(times)
    columns = [Column("system", number=False)]
    for device in devices:
        columns += [Column("seconds", _device(device)), Column("over LR's", _device(device))]
    columns += [Column("seconds per epoch", "runs of Table 2"), Column("of it pre-training", "runs of Table 2")]
    columns += [Column("examples a second", "runs of Table 2"), Column("parameters of the network", "runs of Table 2")]
    rows = [[name, *_time_row(told, name, devices, spent)] for name in told["table2"]]
    panels = [figures.relative_time({device: times[device]}) for device in devices]
    return [
        *blocks,
        Picture("figure6", caption, figures.relative_time(times), panels),
        Details("The numbers", [Table("Training time.", columns, rows)]),
    ]


def _time_row(told: Report, name: str, devices: Sequence[str], spent: Mapping[str, Mapping[str, float]]) -> list[Cell]:
    row = told["table2"][name]
    said: list[Cell] = []
    for device in devices:
        said += [_number(spent[device].get(name), significant=3), _number(told["figure6"][device].get(name), significant=3)]
    pretraining = _number(row["seconds_pretraining"] or None, significant=3)
    return [
        *said,
        _number(row["seconds_per_epoch"], significant=3),
        pretraining,
        _count(row["examples_per_second"]),
        _count(row["parameters"]),
    ]


def _device(device: str) -> str:
    return {"cpu": "CPU", "cuda": "GPU"}.get(device, device)


def _study(told: Report, part: str) -> list[Block]:
    values = told[part]
    number = part.removeprefix("figure")
    blocks: list[Block] = [Heading(f"Figure {number}: {_SUBJECT[part]}"), _claim(part)]
    if not any(row["auc"] is not None for of in values.values() for row in of.values()):
        return [*blocks, Note("Not run.")]
    caption = f"AUC and logloss by {figures.AXES[part]}, all else as in the settings. {_whiskers(values)}"
    panels = [figures.study(part, values, [metric]) for metric in ("auc", "logloss")]
    return [
        *blocks,
        Picture(part, caption, figures.study(part, values), panels),
        Text(f"Lowest logloss here: {'; '.join(_lowest(values))}."),
        Details("The numbers", [_study_table(values, part, metric) for metric in ("auc", "logloss")]),
    ]


def _claim(part: str) -> Text:
    return Text(f"The paper{'' if part == 'figure6' else ', on Company*'}: {published.CLAIMS[part]}")


def _whiskers(values: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    runs = max(row["runs"] for of in values.values() for row in of.values())
    if runs > 1:
        return f"Whiskers: one standard deviation over {runs} seeds; what is closer together than that is not told apart."
    return "One seed: how much of a difference is chance is not known."


def _lowest(values: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    for name in DEEP:
        found = {value: of[name]["logloss"] for value, of in values.items() if name in of and of[name]["logloss"] is not None}
        if found:
            yield f"{name} at {min(found, key=lambda value: found[value])}"


def _study_table(values: Mapping[str, Mapping[str, Mapping[str, Any]]], part: str, metric: str) -> Table:
    name, digits, best = {"auc": ("AUC", 4, max), "logloss": ("Logloss", 5, min)}[metric]
    rows: list[list[Cell]] = []
    for system in DEEP:
        found = [of.get(system, {}) for of in values.values()]
        first = best((of[metric] for of in found if of.get(metric) is not None), default=None)
        texts = [(_spread(of.get(metric), of.get(f"{metric}_std"), digits), of.get(metric)) for of in found]
        rows.append([system, *(Strong(text) if score is not None and score == first else text for text, score in texts)])
    caption = f"{name} by {figures.AXES[part]}; each system's best is set off."
    return Table(caption, [Column("system", number=False), *(Column(value) for value in values)], rows)


# -- the stream, what is absent, how it was done ------------------------------------------------------------------------------------


def _streaming(told: Report) -> list[Block]:
    blocks: list[Block] = [
        Heading("The same systems on the stream"),
        Text(
            "Not in the paper: one pass over the log in the order of its times, each example predicted before it is learned. Every "
            "example is a test example once, and no epoch is repeated or chosen. FNN begins as an FM, and goes on as a network."
        ),
    ]
    if not told["streaming"]:
        return [*blocks, Note("Not run.")]
    columns = [
        Column("system", number=False),
        *(Column(name, group) for group in ("whole log", "last half") for name in ("AUC", "logloss")),
    ]
    columns += [
        Column("difference", "logloss less DeepFM's"),
        Column("95 % interval", "logloss less DeepFM's"),
        Column("examples a second"),
    ]
    rows: list[list[Cell]] = []
    for name in told["table2"]:
        if (of := told["streaming"].get(name)) is None:
            rows.append([name, "missing", *[_NONE] * 6])
            continue
        scores = [_spread(of["auc"], of["auc_std"], 4), _spread(of["logloss"], of["logloss_std"], 5)]
        last = [_number(of["last_half"]["auc"], 4), _number(of["last_half"]["logloss"], 5)]
        difference = _difference(of["minus_deepfm"]) if name != "DeepFM" else ["0", _NONE]
        rows.append([name, *scores, *last, *difference, _count(of["examples_per_second"])])
    caption = (
        "Progressive validation. The interval is a bootstrap over blocks of neighbouring examples; it does not hold the spread over seeds."
    )
    return [*blocks, Table(caption, columns, rows)]


def _absent(told: Report) -> list[Block]:
    if not told["missing"] and not told["failed"]:
        return []
    failed = [f"Failed: {of['system']}, {_place(of)}, seed {of['seed']}: {of['error']}" for of in told["failed"]]
    return [Heading("What is missing"), Listing([*failed, *told["missing"]])]


def _place(of: Mapping[str, Any]) -> str:
    return f"{of['part']} at {of['value']}" if of["value"] and of["part"] in STUDIES else str(of["part"])


def _method(told: Report) -> list[Block]:
    spread = (
        "With one seed the interval holds the first kind of chance only; another seed may well give another order."
        if _one_seed(told)
        else "So few seeds are themselves uncertain; Student's t makes the interval as wide as that demands."
    )
    return [
        Heading("How to read the intervals"),
        Text(
            "A difference is a system's mean loss on the test examples less DeepFM's on the same examples, averaged over the seeds that "
            "both have. Its 95 % interval is for two kinds of chance: which examples are in the test part (a bootstrap over blocks of "
            "neighbouring examples), and which numbers a training began with (the spread of the difference over seeds, by Student's t "
            f"with one degree of freedom less than there are seeds). {spread}"
        ),
        Text(
            "It does not hold what another training part or other hyper-parameters would change. Eight intervals stand side by side: even "
            "if all systems were equally good, one of the eight might leave zero out, in about a third of such reports."
        ),
        Text(
            "AUC and logloss of Table 2 are of the epoch that was best on a validation part of the training data; the test part "
            "chose nothing."
        ),
    ]


# -- numbers as text ----------------------------------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 4, *, significant: int = 0) -> str:
    """So many digits behind the point, or so many that count.

    >>> _number(0.12345, 4), _number(1234.5, significant=3), _number(0.01234, significant=3), _number(None)
    ('0.1235', '1,234', '0.0123', '–')
    """
    if value is None:
        return _NONE
    if not significant:
        return f"{value:.{digits}f}"
    return f"{value:,.0f}" if abs(value) >= 10 ** (significant - 1) else f"{value:.{significant}g}"


def _signed(value: float) -> str:
    return f"{value:+.5f}".replace("-", "\N{MINUS SIGN}")


def _spread(mean: float | None, std: float | None, digits: int) -> str:
    return _number(mean, digits) + (f" \N{PLUS-MINUS SIGN} {std:.{digits}f}" if std is not None else "")


def _count(value: float | str | Sequence[str] | None) -> str:
    """A number of things; of a list, how many it has.

    >>> _count(45840617), _count(["a", "b"]), _count(None)
    ('45,840,617', '2', '–')
    """
    if value is None:
        return _NONE
    return f"{len(value) if isinstance(value, list | tuple) else value:,.0f}" if not isinstance(value, str) else value


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _plain(value: Any) -> str:
    """
    >>> _plain([400, 400]), _plain({"alpha": 0.1}), _plain(True)
    ('400, 400', 'alpha 0.1', 'yes')
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(of)}" for name, of in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return {True: "yes", False: "no", None: "none"}.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)


def _duration(seconds: float) -> str:
    """
    >>> _duration(42.3), _duration(150), _duration(7500)
    ('42 s', '2 min 30 s', '2 h 5 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
