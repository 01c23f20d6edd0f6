"""What the page of a report says, block by block: everything is in the report's dictionary, which is report.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from stream_ctr.paper import figures, published
from stream_ctr.paper.aggregate import STUDIES, chosen, compared, relative_times, too_short, verdict
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
            "Table 1, Table 2 and Figures 6 to 11 of the DeepFM paper, measured again: its systems, on the same hashed features, "
            "the same split and the same test examples. Numbers of the paper itself are in columns of their own."
        ),
        Text(f"The paper: {published.SOURCE}"),
    ]
    if made["quick"]:
        blocks.append(
            Note("A quick run (--quick), with the settings below: it shows that everything works. It is too short for a verdict.")
        )
    if data["whole"]:
        blocks.append(Note(data["whole"]))
    if (dropped := told["settings"]["dropout"]) != published.DROPOUT:
        blocks.append(Note(_DROPOUT_GIVEN.format(dropped, published.DROPOUT)))
    if data["simulated"] is not None:
        blocks.append(Note(_SIMULATED))
    blocks += [Heading("What came out"), *_findings(told), Heading("Data, settings, machine"), Facts([*_data(data), *_made(told)])]
    settings = Facts([(_words(name), _plain(value)) for name, value in told["settings"].items()])
    return [*blocks, Details("All settings", [settings]), Text("The command:"), Code(made["command"])]


_DROPOUT_GIVEN = (
    "The dropout of Table 2, {:g}, was given by hand; the paper's is {:g}. If test scores suggested it, Table 2 flatters it: choose by the "
    "validation loglosses of Figure 8."
)


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
    said = [f"By test logloss, the lowest first: {', '.join(scored)}.", *_papers_order(told)]
    said += _against(told, "DeepFM", "against_deepfm") + _against(told, "LR", "against_lr")
    constant = told["data"]["constant_logloss"]
    if constant is not None and (above := [name for name in order if rows[name]["logloss"] >= constant]):
        said.append(f"No better than the best constant, whose test logloss is {_number(constant, 5)}: {', '.join(above)}.")
    if (best := told["data"]["best_possible_logloss"]) is not None:
        said.append(_closed(told, order[0], best))
    return [Listing(said)]


def _papers_order(told: Report) -> Iterator[str]:
    """By both metrics, which do not agree there."""
    if (paper := _paper(told)) is None or len(told["order"]) < 2:
        return
    of = {name: scores for name, scores in published.TABLE2[paper].items() if name in told["order"]}
    by_logloss = sorted(of, key=lambda name: of[name].logloss)
    by_auc = sorted(of, key=lambda name: -of[name].auc)
    also = " (by AUC the same)" if by_auc == by_logloss else f"; by AUC: {', '.join(by_auc)}"
    yield f"The paper's order of these on {_short(paper)}, by logloss: {', '.join(by_logloss)}{also}."


def _against(told: Report, other: str, verdicts: str) -> list[str]:
    """Who is told apart from another by its interval, and who is not."""
    words = {
        "better": f"Lower logloss than {other}'s, interval below zero",
        "worse": f"Higher logloss than {other}'s, interval above zero",
        "same": f"Not told apart from {other}, interval around zero",
    }
    found = {kind: [name for name in told["order"] if told[verdicts].get(name) == kind] for kind in words}
    return [f"{words[kind]}: {', '.join(names)}." for kind, names in found.items() if names]


def _closed(told: Report, first: str, best: float) -> str:
    lost, constant = told["table2"][first]["logloss"], told["data"]["constant_logloss"]
    said = f"The best possible test logloss is {_number(best, 5)}; {first} is {_number(lost - best, 5)} above it"
    if constant is None or constant <= lost:
        return said + "."
    return said + f", and has {_percent((constant - lost) / (constant - best))} of what there is to learn beyond the best constant."


def _data(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    counted = f"{_count(data['impressions'])} impressions, {_count(data['clicks'])} clicks, CTR {_percent(data['ctr'])}"
    yield "Data", f"{data['name']} ({data['format']}): {counted}"
    fields = f"{data['fields']} fields ({_count(data['categorical'])} categorical, {_count(data['numeric'])} numeric)"
    crosses = data["crosses"] or "none, so it has single features only"
    yield "Fields", f"{fields}; cross products for the wide part of LR & DNN: {crosses}"
    if data["numeric_encoding"]:
        yield "Numbers", data["numeric_encoding"]
    how = {"random": "at random, the same for all", "time": "by time, the last are the test part"}[data["split"]]
    validation = f"{_count(data['validation'])} for validation"
    yield "Split", f"{how}: {_count(data['train'])} examples to train, {validation}, {_count(data['test'])} to test"
    if data["constant_logloss"] is not None:
        yield "Logloss of the best constant", f"{_number(data['constant_logloss'], 5)} on the test part"
    if data["best_possible_logloss"] is not None:
        yield "Best possible logloss", f"{_number(data['best_possible_logloss'], 5)} on the test part"
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
    alone = "; with one seed there is no spread to report" if _one_seed(told) else ""
    yield "Seeds", f"{made['seeds']} for Table 2, {made['study_seeds']} for Figures 7 to 11{alone}"
    for where in told["machines"]:
        yield "Machine", _machine(where, several=len(told["machines"]) > 1)
    if made["accelerator"]:
        yield "Networks on", made["accelerator"]
    yield "Took", f"{_duration(made['seconds_total'])} for all runs"


def _machine(where: Mapping[str, Any], *, several: bool) -> str:
    machine = where["machine"]
    runs = f"; {_count(where['runs'])} points of the tables and figures" if several else ""
    return f"{machine['processor']}, {machine['cores']} cores; stream-ctr {where['version']}, torch {where['torch']}{runs}"


_USUAL: Mapping[str, Callable[[Any], str]] = {
    "dropout": lambda share: f"dropout {share:g}",
    "hidden": lambda widths: f"network {'-'.join(map(str, widths))}",
    "embedding_dim": lambda width: f"K = {width}",
    "table_bits": lambda bits: f"an embedding table of 2^{bits} = {_count(2**bits)} rows",
    "table_optimizer": lambda name: f"table by {'lazy Adam (only the rows of a batch step)' if name == 'adam' else name}",
    "dense_learning_rate": lambda rate: f"network by Adam, rate {rate:g}",
    "ftrl": lambda rates: f"LR by FTRL, {_plain(rates)}",
    "batch_size": lambda size: f"batches of {_count(size)}",
    "epochs": lambda most: f"at most {most} {'epoch' if most == 1 else 'epochs'}",
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
    return "criteo" if data["format"] == "criteo" else "company" if data["simulated"] is not None else None


def _short(paper: str) -> str:
    return {"criteo": "Criteo", "company": "Company*"}[paper]


def _table2(told: Report) -> list[Block]:
    ended = [name for name in told["table2"] if told["table2"][name]["runs"]]
    if not ended:
        return []
    paper, best, other = _paper(told), told["data"]["best_possible_logloss"], _reference(told)
    here = "measured here"
    columns = [Column("system", number=False), Column("AUC", here), Column("logloss", here)]
    columns += [Column("above the best possible", here)] if best is not None else []
    if paper:
        columns += [Column(name, f"the paper, on {_short(paper)}", quoted=True) for name in ("AUC", "logloss")]
    columns += _difference_columns(other) if other else []
    columns += [Column("seconds", "training"), Column("epochs", "training")]
    rows = [_table2_row(told, name, paper, best, other) for name in ended]
    blocks: list[Block] = [Heading("Table 2: performance"), Table(_table2_caption(told), columns, rows)]
    about = f"The paper's numbers are of {published.DATA[paper]}: compare orders, not digits." if paper else None
    blocks.append(Text(about or "The paper has no numbers on this data."))
    blocks += [_differences(told)] if other == "DeepFM" else []
    return [*blocks, *_of_pretraining(told), *_at_the_limit(told), Details("Validation, and differences to LR", [_more_table(told, ended)])]


def _reference(told: Report) -> str | None:
    """The system whose logloss the others' are compared with: DeepFM, or LR where DeepFM was not run."""
    compared = {"DeepFM": "minus_deepfm", "LR": "minus_lr"}
    return next((name for name, kind in compared.items() if any(row[kind] for row in told["table2"].values())), None)


def _difference_columns(other: str) -> list[Column]:
    return [Column(name, f"logloss less {other}'s") for name in ("difference", "95 % interval")]


def _table2_row(told: Report, name: str, paper: str | None, best: float | None, other: str | None) -> list[Cell]:
    row = told["table2"][name]
    said: list[Cell] = [_best(told, row, "auc", 4), _best(told, row, "logloss", 5)]
    if best is not None:
        said.append(_number(None if row["logloss"] is None else row["logloss"] - best, 5))
    if paper:
        said += [f"{row['published'][paper]['auc']:.4f}", f"{row['published'][paper]['logloss']:.5f}"]
    if other:
        said += _difference_to(other, name, row)
    return [name, *said, _number(row["seconds"], significant=2), _number(row["epochs"], 2)]


def _difference_to(other: str, name: str, row: Mapping[str, Any]) -> list[Cell]:
    return ["0", _NONE] if name == other else _difference(row["minus_deepfm" if other == "DeepFM" else "minus_lr"])


def _more_table(told: Report, ended: Sequence[str]) -> Table:
    columns = [Column("system", number=False), Column("best", "validation logloss"), Column("less the test's", "validation logloss")]
    columns += [Column("logloss, last epoch", "training"), Column("epochs", "training"), *_difference_columns("LR")]
    rows: list[list[Cell]] = []
    for name in ended:
        row = told["table2"][name]
        validation = _spread(row["validation_logloss"], row["validation_logloss_std"], 5)
        above = _NONE if row["logloss"] is None else _signed(row["validation_logloss"] - row["logloss"])
        training = [_number(row["train_logloss"], 5), _number(row["epochs_trained"], 2)]
        rows.append([name, validation, above, *training, *_difference_to("LR", name, row)])
    caption = (
        "The training logloss is of the last epoch, as far as it went: of each example before it was learned, with what dropout left. "
        "Epochs are counted until training was stopped."
    )
    return Table(caption, columns, rows)


def _of_pretraining(told: Report) -> list[Block]:
    row = told["table2"]["FNN"]
    if not (began := row["pretraining"]):
        return []
    fm, network = began["validation_logloss"], row["validation_logloss"]
    than = "above" if network > fm else "below"
    return [
        Text(
            f"FNN began as an FM, whose best validation logloss was {_number(fm, 5)}, after {_number(began['epochs'], 2)} epochs. That of "
            f"the network on its embeddings is {_number(network, 5)}: {_number(abs(network - fm), 5)} {than} it."
        )
    ]


def _best(told: Report, row: Mapping[str, Any], metric: str, digits: int) -> Cell:
    """The mean and its spread; strong where no system's is better."""
    text = _spread(row[metric], row[f"{metric}_std"], digits)
    found = [of[metric] for of in told["table2"].values() if of[metric] is not None]
    first = found and row[metric] == (max(found) if metric == "auc" else min(found))
    return Strong(text) if first else text


def _table2_caption(told: Report) -> str:
    devices = {row["device"] for row in told["table2"].values() if row["runs"]}
    where = "on a GPU, LR's on one core of the CPU" if "cuda" in devices else "on the CPU"
    return (
        f"{_over_seeds(told)}, on {_count(told['data']['test'])} test examples. Seconds (the median over seeds, start-up left out) and "
        f"epochs are of training until the best check on validation; FNN's seconds with its pre-training; {where}. The best AUC and "
        "logloss are set off, and differences whose interval leaves zero out."
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


def _at_the_limit(told: Report) -> list[Block]:
    most = told["settings"]["epochs"]
    still = [name for name, row in told["table2"].items() if row["epochs"] == most]
    return [Text(f"At their best when the limit ended their training, so more epochs may help: {', '.join(still)}.")] if still else []


def _figure6(told: Report) -> list[Block]:
    times = told["figure6"]
    if not times:
        return []
    blocks: list[Block] = [Heading("Figure 6: training time"), _claim("figure6")]
    whole, per_epoch = (relative_times(times, kind) for kind in ("seconds", "seconds_per_epoch"))
    tables = [_time_table(told, device, whole.get(device), per_epoch.get(device)) for device in times]
    if not whole:
        return [*blocks, Note(_no_ratio(times)), *tables]
    panels = [figures.relative_time({device: of}, per_epoch) for device, of in whole.items()]
    picture = Picture("figure6", _figure6_caption(told), figures.relative_time(whole, per_epoch), panels)
    return [*blocks, picture, Details("The numbers", tables)]


def _no_ratio(times: Mapping[str, Mapping[str, Any]]) -> str:
    if not too_short(times):
        return "No multiples of LR's time: LR and another system must have been timed on one machine."
    epoch = times["cpu"]["LR"]["seconds_per_epoch"]["median"]
    return f"Too short to time: an epoch of LR takes {_number(epoch, significant=1)} s, and a multiple of that would be mostly noise."


def _figure6_caption(told: Report) -> str:
    gpu = " in the GPU's panel too, for it has no GPU code" if set(told["figure6"]) - {"cpu"} else ""
    several = " Of several machines, one is shown." if len({str(where["machine"]) for where in told["machines"]}) > 1 else ""
    return (
        "Bars: training time until the best check over LR's, medians over seeds, FNN's pre-training included; whiskers from the least to "
        "the most. Diamonds: an epoch over LR's, since how many epochs a system needs is another question. The axis goes by powers of ten. "
        f"LR is FTRL-Proximal in compiled code on one CPU core{gpu}.{several}"
    )


Times = Mapping[str, Mapping[str, Any]]  # by system


def _time_table(told: Report, device: str, whole: Times | None, per_epoch: Times | None) -> Table:
    columns = [Column("system", number=False), Column("runs")]
    for group in ("until the best check", "an epoch"):
        columns += [Column("seconds", group), Column("least to most", group)]
        columns += [Column("over LR's", group)] if whole else []
    columns += [Column("seconds of pre-training"), Column("examples a second"), Column("parameters of the network")]
    rows: list[list[Cell]] = []
    for name, time in told["figure6"][device].items():
        said: list[Cell] = [name, str(time["runs"])]
        for kind, over in (("seconds", whole), ("seconds_per_epoch", per_epoch)):
            said += _taken(time[kind], time["runs"])
            said += [_number(over[name]["median"], significant=2)] if over else []
        rows.append([*said, *_of_table2(told["table2"][name], device)])
    return Table(f"Training time on the {_device(device)}.", columns, rows)


def _taken(seconds: Mapping[str, float], runs: int) -> list[Cell]:
    middle, least, most = (_number(seconds[part], significant=2) for part in ("median", "least", "most"))
    return [middle, f"{least} to {most}" if runs > 1 else _NONE]


def _of_table2(row: Mapping[str, Any], device: str) -> list[Cell]:
    """Where Table 2 was on that device."""
    if row["device"] != device:
        return [_NONE] * 3
    return [
        _number(row["seconds_pretraining"] or None, significant=2),
        _number(row["examples_per_second"], significant=2),
        _count(row["parameters"]),
    ]


def _device(device: str) -> str:
    return {"cpu": "CPU", "cuda": "GPU"}.get(device, device)


def _study(told: Report, part: str) -> list[Block]:
    values = compared(told[part])
    number = part.removeprefix("figure")
    if not values:
        return []
    blocks: list[Block] = [Heading(f"Figure {number}: {_SUBJECT[part]}"), _claim(part)]
    caption = f"Test AUC and logloss by {figures.AXES[part]}, all else as in the settings. {_whiskers(values)}"
    panels = [figures.study(part, values, [metric]) for metric in ("auc", "logloss")]
    best = [f"{name} at {value}" for name, value in chosen(values).items()]
    return [
        *blocks,
        Picture(part, caption, figures.study(part, values), panels),
        Text(f"Lowest logloss on validation: {'; '.join(best)}."),
        Details("The numbers", [_study_table(values, part, metric) for metric in _STUDIED]),
    ]


_STUDIED = {"validation_logloss": ("Validation logloss", 5), "logloss": ("Test logloss", 5), "auc": ("Test AUC", 4)}


def _claim(part: str) -> Text:
    return Text(f"The paper{'' if part == 'figure6' else ', on Company*'}: {published.CLAIMS[part]}")


def _whiskers(values: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    runs = max(row["runs"] for of in values.values() for row in of.values())
    if runs > 1:
        return f"Whiskers: one standard deviation over {runs} seeds; what is closer together than that is not told apart."
    return "One seed: how much of a difference is chance is not known."


def _study_table(values: Mapping[str, Mapping[str, Mapping[str, Any]]], part: str, metric: str) -> Table:
    name, digits = _STUDIED[metric]
    best = chosen(values)
    rows: list[list[Cell]] = []
    for system in best:
        texts = {value: _spread(point.get(metric), point.get(f"{metric}_std"), digits)
                 for value, of in values.items() for point in [of.get(system, {})]}  # fmt: skip
        rows.append([system, *(Strong(text) if value == best[system] else text for value, text in texts.items())])
    caption = f"{name} by {figures.AXES[part]}; set off is where the validation logloss is the lowest."
    return Table(caption, [Column("system", number=False), *(Column(value) for value in values)], rows)


# -- the stream, what is absent, how it was done ------------------------------------------------------------------------------------


def _streaming(told: Report) -> list[Block]:
    found = told["streaming"]
    if not found:
        return []
    columns = [
        Column("system", number=False),
        *(Column(name, group) for group in ("whole log", "last half") for name in ("AUC", "logloss")),
        *(_difference_columns("DeepFM") if "DeepFM" in found else []),
        Column("examples a second"),
    ]
    caption = (
        "Progressive validation. The interval is a bootstrap over blocks of neighbouring examples; it does not hold the spread over seeds."
    )
    rows = [_streaming_row(found, name) for name in told["table2"] if name in found]
    return [Heading("The same systems on the stream"), *_of_streaming(told["settings"]["streaming"]), Table(caption, columns, rows)]


def _of_streaming(settings: Mapping[str, Any]) -> list[Block]:
    pretrained = settings["pretrain_examples"]
    network = f"dropout {settings['dropout']:g}, network {'-'.join(map(str, settings['hidden']))}, table by {settings['table_optimizer']}"
    return [
        Text(
            "Not in the paper: one pass over the log in the order of its times, each example predicted before it is learned. Every example "
            f"is a test example once, and nothing is repeated or chosen. Settings are those of streams, not the paper's: {network}."
        ),
        Text(
            f"A network predicts a batch of {_count(settings['batch_size'])} before it learns any of it; LR learns each example before the "
            "next, so it is up to a batch ahead."
            + (f" FNN is an FM for the first {_count(pretrained)} examples, and goes on as a network." if pretrained else "")
        ),
    ]


def _streaming_row(found: Mapping[str, Mapping[str, Any]], name: str) -> list[Cell]:
    of = found[name]
    row: list[Cell] = [name, _spread(of["auc"], of["auc_std"], 4), _spread(of["logloss"], of["logloss_std"], 5)]
    row += [_number(of["last_half"]["auc"], 4), _number(of["last_half"]["logloss"], 5)]
    row += _difference_to("DeepFM", name, of) if "DeepFM" in found else []
    return [*row, _number(of["examples_per_second"], significant=2)]


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


# -- numbers as text ----------------------------------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 4, *, significant: int = 0) -> str:
    """So many digits behind the point, or so many that count.

    >>> _number(0.12345, 4), _number(1234.5, significant=3), _number(0.01234, significant=3), _number(None)
    ('0.1235', '1,230', '0.0123', '–')
    """
    if value is None:
        return _NONE
    if not significant:
        return f"{value:.{digits}f}"
    rounded = float(f"{value:.{significant}g}")
    return f"{rounded:,.0f}" if abs(value) >= 10 ** (significant - 1) else f"{rounded:g}"


def _signed(value: float) -> str:
    return f"{value:+.5f}".replace("-", "\N{MINUS SIGN}")


def _spread(mean: float | None, std: float | None, digits: int) -> str:
    return _number(mean, digits) + (f" \N{PLUS-MINUS SIGN} {std:.{digits}f}" if std is not None else "")


def _count(value: float | None) -> str:
    """A number of things.

    >>> _count(45840617), _count(None)
    ('45,840,617', '–')
    """
    return _NONE if value is None else f"{value:,.0f}"


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
