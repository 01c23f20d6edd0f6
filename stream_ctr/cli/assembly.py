"""From a configuration to a trainer: the one place below the commands that reads a `Config`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from stream_ctr.config import Config, in_milliseconds, size
from stream_ctr.distributed.ranks import Ranks
from stream_ctr.errors import ConfigError
from stream_ctr.evaluate.field_health import Columns, FieldHealth
from stream_ctr.evaluate.gate import Gate
from stream_ctr.evaluate.scoreboard import MetricWindows, Scoreboard
from stream_ctr.events.avro_events import Schemas
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.features import Hasher
from stream_ctr.events.field import Field, Schema
from stream_ctr.events.field_changes import compare_fields
from stream_ctr.events.fit import NOTHING, Fitted
from stream_ctr.events.times import TimeFormat
from stream_ctr.extensions import is_import_path
from stream_ctr.join.joiner import Joiner, LabelJoiner
from stream_ctr.join.shared_joiner import SharedJoiner
from stream_ctr.join.spill import folder_of_rank, remove_folders
from stream_ctr.join.watermark import Watermarks
from stream_ctr.learn.baseline import BaselineProcess
from stream_ctr.learn.blend import Blend
from stream_ctr.learn.device import choose_device, choose_precision
from stream_ctr.learn.learner import MakeLearner, make_learner
from stream_ctr.learn.pairs import choose_columns, columns_after
from stream_ctr.learn.runtimes import graph_builder
from stream_ctr.learn.spec import (
    BLEND,
    EXPERTS,
    LARGEST_PAIR_BITS,
    SYSTEMS,
    FtrlRates,
    LearnerSpec,
    Pairs,
    TableOptimizer,
)
from stream_ctr.learn.step import batch_size_after
from stream_ctr.learn.thread_pool import set_up_process
from stream_ctr.models.registered import follows_online_rule, register_model
from stream_ctr.snapshots.delta_writer import Outlet
from stream_ctr.snapshots.export import graphs_of
from stream_ctr.snapshots.manifest import BaselineSpec, JoinSpec, Origin, RunIdentity
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.snapshots.report_log import Rotation
from stream_ctr.snapshots.signing import SigningKey
from stream_ctr.snapshots.snapshot_writer import Graphs
from stream_ctr.train.as_served import AsServed
from stream_ctr.train.delta_cycle import DeltaPolicy
from stream_ctr.train.front import Front
from stream_ctr.train.front_lead import Faces, LeadWatermarks
from stream_ctr.train.ingest import Ingest
from stream_ctr.train.inputs import Inputs
from stream_ctr.train.predictions import PredictionLog
from stream_ctr.train.read_ahead import ReadAhead
from stream_ctr.train.sampled_baseline import SampledBaseline
from stream_ctr.train.snapshot_cycle import SnapshotPolicy
from stream_ctr.train.source import Source
from stream_ctr.train.state import TrainingState
from stream_ctr.train.trainer import Surroundings, Trainer

FTRL, FTRL_SCALED, FTRL_PAIRS, FTRL_PAIRS_SLOW = EXPERTS
SCALED_ALPHA = 3.0
SLOW_ALPHA = 1.0
"""The rates of logistic regressions, times the number of their columns."""
SLOW_BETA = 0.1
Marks = TypeVar("Marks", bound=Watermarks)
MakeFront = Callable[[RunIdentity, Inputs], Faces | None]
"""Lets all ranks read these inputs and join; None where rank 0 does it alone."""
KEPT_SECTIONS = ("features", "join", "model", "learn", "ftrl", "baseline", "metrics")
"""The sections of the configuration that a state directory keeps for later runs."""


def build_trainer(
    config: Config,
    *,
    fields: Sequence[Field],
    fitted: Fitted = NOTHING,
    earlier: RunIdentity | None = None,
    origin: Origin | UnsetType = UNSET,
    source: Source,
    publisher: Publisher,
    directory: Path,
    surroundings: Surroundings | None = None,
    in_event_time: bool = False,
    keep_open: bool = False,
    predictions: Path | None = None,
    schemas: Schemas | None = None,
    delta_outlets: Sequence[Outlet] = (),
    make: MakeLearner | None = None,
    front: MakeFront | None = None,
) -> Trainer:
    """Build everything that `run` runs.

    With `in_event_time`, which is for logs, the weights that impressions are served with are
    published by event time. With `keep_open`, the end of the source closes nothing. Predictions go
    to the directory `predictions`. `fitted` is what the numbers of the `fields` were fitted to,
    `earlier` the run that this one goes on from, and `origin` the snapshot of another run whose
    weights it began with. `schemas` has those of Avro records. Deltas go to `delta_outlets` too.
    `make` makes the learners, in place of those of one process. With `front`, all ranks of the run
    read the source and join.

    Raises `ConfigError` if the machine cannot do what the configuration asks for.
    """
    set_up_process()
    surroundings = surroundings or Surroundings()
    config = _with_precision(config)
    make = make or partial(make_learner, device=config.learn.device, threads=config.learn.threads)
    identity = run_identity(config, fields, fitted, earlier=earlier, origin=origin)
    fronted = front(identity, Inputs.of(source)) if front else None
    hasher = _hasher(identity)
    ingest, joiner, watermarks = fronted or (
        _reader(config, identity, source, schemas, surroundings),
        _joiner(config, identity, directory / "spill"),
        _watermarks(Watermarks, config, identity, source),
    )
    baseline = _baseline(identity) if config.baseline.enabled else None
    served = _as_served(config, identity, make, in_event_time=in_event_time)
    fields_measured = _field_health(config, hasher) if config.metrics.field_health else None
    state = _state(config, identity, joiner, watermarks, baseline, served, fields_measured, make)
    return Trainer(
        ingest=ingest,
        state=state,
        publisher=publisher,
        identity=identity,
        snapshots=SnapshotPolicy(
            directory,
            every_examples=config.schedule.snapshot_examples,
            keep=config.snapshots.keep,
            signing=signing_key(config),
            graphs=_graphs(identity) if config.snapshots.onnx else None,
            deltas=_deltas(config, delta_outlets),
        ),
        baseline=baseline,
        served=served,
        predictions=_predictions(predictions, directory, state, served),
        max_bad_share=config.input.max_bad_share,
        keep_open=keep_open,
        surroundings=surroundings,
    )


def build_front(
    config: Config,
    identity: RunIdentity,
    inputs: Inputs,
    ranks: Ranks,
    directory: Path,
    *,
    schemas: Schemas | None = None,
    translated: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Front:
    """Build this rank's part of reading and joining; every rank calls it.

    `inputs` have the source that this rank has opened, and `directory` is the state directory, on a
    file system that all ranks share. `join.max_memory` is for all ranks together. `translated` is
    the context in which errors of the source become errors of this package.

    Raises `ConfigError` if the ranks cannot read the source.
    """
    inputs.divide(ranks.rank, ranks.size)
    leads = ranks.rank == 0
    spill = directory / "spill"
    if leads:
        remove_folders(spill)
    ranks.all_true(True)  # nobody makes a folder before that
    schema = identity.schema
    own = folder_of_rank(spill, ranks.rank)
    joiner = SharedJoiner(
        ranks,
        _joiner(config, identity, own, rank=ranks.rank, ranks=ranks.size),
        _watermarks(LeadWatermarks if leads else Watermarks, config, identity, inputs),
        partitions=inputs.last,
        columns=len(schema.fields) + len(schema.crosses),
        value_fields=len(schema.value_fields),
        id_bits=schema.table_bits,
    )
    reader = _reader(config, identity, inputs, schemas, Surroundings())
    return Front(ranks, reader, joiner, translated=translated)


def _reader(
    config: Config,
    identity: RunIdentity,
    source: Source,
    schemas: Schemas | None,
    surroundings: Surroundings,
) -> Ingest | ReadAhead:
    ingest = Ingest(
        source,
        Decoder(
            identity.schema.fields,
            max_record_bytes=config.input.max_record_bytes,
            max_ahead_ms=in_milliseconds(config.input.max_ahead),
            time_format=TimeFormat(config.input.time_unit, config.input.time_zone),
            schemas=schemas,
            format=config.input.format,
        ),
        _hasher(identity),
        idle_seconds=config.join.idle_timeout.total_seconds(),
        clock=surroundings.clock,
        wall_clock=surroundings.wall_clock,
    )
    read_ahead = config.input.read_ahead
    return ReadAhead(ingest, most_records=read_ahead) if read_ahead else ingest


def _hasher(identity: RunIdentity) -> Hasher:
    schema = identity.schema
    return Hasher(
        schema.fields,
        table_bits=schema.table_bits,
        hash_seed=schema.hash_seed,
        numeric_encoding=schema.numeric_encoding,
        buckets_per_octave=schema.buckets_per_octave,
        crosses=schema.crosses,
        bucket_edges=schema.bucket_edges,
        value_scales=schema.value_scales,
    )


def _watermarks(kind: type[Marks], config: Config, identity: RunIdentity, source: Source) -> Marks:
    return kind(
        partitions=len(source.partitions),
        lateness_ms=identity.join.allowed_lateness_ms,
        stall_clicks=config.join.stall_clicks,
    )


def _deltas(config: Config, outlets: Sequence[Outlet]) -> DeltaPolicy | None:
    if not config.snapshots.delta_every:
        return None
    return DeltaPolicy(precision=config.snapshots.delta_precision, outlets=tuple(outlets))


def _graphs(identity: RunIdentity) -> Graphs:
    """Return the function that makes the ONNX graphs of a snapshot's networks.

    Raises `ConfigError` if a model of the run can have none, or if onnx is not installed.
    """
    for name, spec in identity.specs.items():
        if spec.model not in SYSTEMS:
            raise ConfigError(
                f"snapshots.onnx = true: the model {name!r:.80} has no ONNX graph, only the "
                "paper's systems have one; leave the key out, and serve with torch"
            )
    return partial(graphs_of, build=graph_builder())


def signing_key(config: Config) -> SigningKey | None:
    """Return the key that snapshots are signed with, or None.

    Raises `ConfigError` if its file cannot be read.
    """
    path = config.snapshots.signing_key
    return SigningKey(Path(path)) if path else None


def register_named_models(config: Config) -> None:
    """Import and register the models that this configuration names by an import path.

    The configuration must be one that a person gave, not one that was read from a snapshot.
    """
    for name in (config.model.name, *config.model.beside):
        if is_import_path(name):
            register_model(name)


def rotation(config: Config) -> Rotation:
    """Return when another file of reports begins."""
    metrics = config.metrics
    return Rotation(
        max_bytes=size(metrics.report_file_size),
        max_seconds=metrics.report_file_age.total_seconds(),
        keep=metrics.report_files,
    )


def run_identity(
    config: Config,
    fields: Sequence[Field],
    fitted: Fitted = NOTHING,
    *,
    earlier: RunIdentity | None = None,
    origin: Origin | UnsetType = UNSET,
) -> RunIdentity:
    """Return what snapshots of this configuration say about their run.

    Pairs of fields keep the rows that they have in the run that is `earlier`.

    Raises `ConfigError` if a cross product has a wrong member.
    """
    schema = _schema(config, fields, fitted)
    specs = _specs(config, schema, earlier)
    blends = config.model.name == BLEND
    join = config.join
    rates = config.baseline.model_dump(exclude={"enabled", "sample_rate"})
    return RunIdentity(
        model=config.snapshots.model_name,
        schema=schema,
        learner=UNSET if blends else specs.pop(config.model.name),
        blend=tuple(specs) if blends else (),
        beside=specs,
        join=JoinSpec(
            label_window_ms=in_milliseconds(join.label_window),
            early_click_wait_ms=in_milliseconds(join.early_click_wait),
            duplicate_horizon_ms=in_milliseconds(join.duplicate_horizon),
            allowed_lateness_ms=in_milliseconds(join.allowed_lateness),
        ),
        baseline=BaselineSpec(
            enabled=config.baseline.enabled,
            sample_rate=config.baseline.sample_rate,
            value_fields=schema.value_fields,
            **rates,
        ),
        config=_kept_config(config, fields),
        origin=origin,
    )


def _with_precision(config: Config) -> Config:
    """Replace the precision "auto" by that of the device."""
    device = choose_device(config.learn.device)
    learn = config.learn.model_copy(
        update={"precision": choose_precision(config.learn.precision, device)}
    )
    return config.model_copy(update={"learn": learn})


def _schema(config: Config, fields: Sequence[Field], fitted: Fitted) -> Schema:
    features = config.features
    try:
        return Schema(
            fields=tuple(fields),
            table_bits=config.model.table_bits,
            numeric_encoding=features.numeric_encoding,
            buckets_per_octave=features.buckets_per_octave,
            hash_seed=features.hash_seed,
            crosses=features.crosses,
            bucket_edges=fitted.bucket_edges,
            value_scales=fitted.value_scales,
        )
    except ValueError as error:
        raise ConfigError(f"features.crosses: {error}") from None


def _kept_config(config: Config, fields: Sequence[Field]) -> dict[str, dict[str, object]]:
    kept = config.model_dump(mode="json", include=set(KEPT_SECTIONS))
    named = {
        kind: [field.name for field in fields if field.kind == kind]
        for kind in ("categorical", "numeric")
    }
    return {**kept, "features": {**kept["features"], **named}}


def _specs(config: Config, schema: Schema, earlier: RunIdentity | None) -> dict[str, LearnerSpec]:
    """Return the specification of each model that learns, a published one first."""
    common = LearnerSpec(
        fields=len(schema.fields),
        crosses=len(schema.crosses),
        value_fields=schema.value_fields,
        **config.model.model_dump(exclude={"name", "beside"}),
        **config.learn.model_dump(exclude={"device", "threads", "skips_before_rollback"}),
    )
    rates = FtrlRates(**config.ftrl.model_dump(exclude={"enabled"}))
    blends = config.model.name == BLEND
    models = config.model.mixed if blends else (config.model.name, *config.model.beside)
    specs: dict[str, LearnerSpec] = {
        model: replace(
            common,
            model=model,
            ftrl=rates if model == "lr" else UNSET,
            table_optimizer=_optimizer(config, model),
        )
        for model in models
    }
    if config.ftrl.enabled and "lr" not in models:
        specs[FTRL] = replace(common, model="lr", ftrl=rates)
    if not blends:
        return specs
    return {**specs, **_experts(common, specs, _pairs(common, schema, earlier))}


def _optimizer(config: Config, model: str) -> TableOptimizer:
    """Return the optimizer of the model's table: the online rule is for models that declare it."""
    chosen = config.learn.table_optimizer
    return "adagrad" if chosen == "online" and not follows_online_rule(model) else chosen


def _pairs(common: LearnerSpec, schema: Schema, earlier: RunIdentity | None) -> Pairs:
    """Return the pairs of fields: those of the `earlier` run where these fields were in it."""
    # Pairs have more values than fields.
    bits = min(common.table_bits + 2, LARGEST_PAIR_BITS)
    spec = earlier.beside.get(FTRL_PAIRS) if earlier else None
    if (
        earlier is None
        or spec is None
        or spec.pairs is UNSET
        or (earlier.schema.table_bits, earlier.schema.hash_seed)
        != (schema.table_bits, schema.hash_seed)
    ):
        columns = choose_columns(common.fields, common.value_fields)
        return Pairs(columns=tuple(columns), table_bits=bits)
    return columns_after(
        spec.pairs,
        [field.name for field in earlier.schema.fields],
        [field.name for field in schema.fields],
        stay=compare_fields(earlier.schema, schema).stay,
        without=common.value_fields,
    )


def _experts(
    common: LearnerSpec, specs: Mapping[str, LearnerSpec], pairs: Pairs
) -> dict[str, LearnerSpec]:
    """Return the logistic regressions that a blend has beside `specs`.

    The scaled rate is the one at which all columns together move a logit three units at most. Over
    pairs there are two: the slow one takes larger first steps and smaller later ones, which some
    logs need and others do not. One whose twin is among `specs` is left out.
    """

    def expert(
        columns: int, alpha: float, beta: float = 1.0, pairs: Pairs | UnsetType = UNSET
    ) -> LearnerSpec:
        rates = FtrlRates(alpha=alpha / columns, beta=beta)
        return replace(common, model="lr", ftrl=rates, pairs=pairs)

    scaled = expert(common.fields, SCALED_ALPHA)
    experts = {} if scaled in specs.values() else {FTRL_SCALED: scaled}
    columns = len(pairs.columns)
    if columns > common.fields:
        experts[FTRL_PAIRS] = expert(columns, SCALED_ALPHA, pairs=pairs)
        experts[FTRL_PAIRS_SLOW] = expert(columns, SLOW_ALPHA, SLOW_BETA, pairs=pairs)
    return experts


def _joiner(
    config: Config, identity: RunIdentity, spill: Path, *, rank: int = 0, ranks: int = 1
) -> LabelJoiner:
    """Return the joiner of one of so many ranks, which has its share of the memory."""
    schema = identity.schema
    join = identity.join
    try:
        return LabelJoiner(
            fields=len(schema.fields) + len(schema.crosses),
            value_fields=len(schema.value_fields),
            id_bits=schema.table_bits,
            label_window_ms=join.label_window_ms,
            early_click_wait_ms=join.early_click_wait_ms,
            duplicate_horizon_ms=join.duplicate_horizon_ms,
            max_bytes=size(config.join.max_memory) // ranks,
            over_bound=config.join.over_memory,
            spill_directory=spill,
            segment_numbers=(rank, ranks),
        )
    except ValueError as error:
        each = f" for {ranks} ranks" if ranks > 1 else ""
        raise ConfigError(f"join.max_memory = {config.join.max_memory!r}{each}: {error}") from None


def _baseline(identity: RunIdentity) -> SampledBaseline:
    spec = identity.baseline
    process = BaselineProcess(
        alpha=spec.alpha,
        beta=spec.beta,
        l1=spec.l1,
        l2=spec.l2,
        intercept_learning_rate=spec.intercept_learning_rate,
        value_fields=spec.value_fields,
    )
    return SampledBaseline(process, share=spec.sample_rate, fields=len(identity.schema.fields))


def _state(
    config: Config,
    identity: RunIdentity,
    joiner: Joiner,
    watermarks: Watermarks,
    baseline: SampledBaseline | None,
    served: AsServed | None,
    fields: FieldHealth | None,
    make: MakeLearner,
) -> TrainingState:
    specs = identity.specs
    blend = Blend(identity.blend) if identity.blend else None
    models = [*dict.fromkeys([identity.published, *specs]), *([baseline.name] if baseline else [])]
    limits = config.snapshots
    return TrainingState(
        joiner=joiner,
        watermarks=watermarks,
        learners={name: make(spec) for name, spec in specs.items()},
        scoreboard=Scoreboard(
            models,
            windows=MetricWindows(
                in_milliseconds(config.metrics.window), config.metrics.rolling_windows
            ),
            gate=Gate(limits.gate_clicks, limits.gate_logloss, limits.gate_calibration),
            served=served.names if served else (),
            in_memory=bool(served and not served.of_snapshots),
            baselines=_baselines(identity, models),
        ),
        batch_size=_batch_sizes(config),
        blend=blend,
        fields=fields,
        skips_before_rollback=config.learn.skips_before_rollback,
    )


def _field_health(config: Config, hasher: Hasher) -> FieldHealth:
    """Return what measures the columns of ids, those of cross products by "a*b"."""
    absent = {
        field.name: pa.nulls(1, pa.float64() if field.kind == "numeric" else pa.string())
        for field in hasher.fields
    }
    names = [field.name for field in hasher.fields]
    names += ["*".join(cross) for cross in hasher.crosses]
    value_columns = np.full(len(names), -1)
    value_columns[hasher.value_fields] = np.arange(len(hasher.value_fields))
    columns = Columns(
        names=tuple(names),
        missing_ids=hasher.rows(absent)[0][0, : len(hasher.fields)],
        value_columns=value_columns,
        table_bits=hasher.table_bits,
    )
    return FieldHealth(
        columns,
        window_ms=in_milliseconds(config.metrics.window),
        rolling=config.metrics.rolling_windows,
        share=config.metrics.field_share,
    )


def _baselines(identity: RunIdentity, models: Sequence[str]) -> list[str]:
    """Return the logistic regressions that a published network should beat."""
    specs = identity.specs
    if identity.published in specs and specs[identity.published].model == "lr":
        return []
    return [name for name in models[1:] if name not in specs or specs[name].model == "lr"]


def _batch_sizes(config: Config) -> Callable[[int], int]:
    """Return the function from the examples learned so far to the size of the next batch."""
    largest = config.learn.batch_size
    if config.learn.table_optimizer == "online":
        return partial(batch_size_after, largest=largest)
    return lambda examples: largest


def _as_served(
    config: Config, identity: RunIdentity, make: MakeLearner, *, in_event_time: bool
) -> AsServed | None:
    """Return what scores impressions as served: the published model, and LR, which is cheap."""
    share = config.metrics.served_share
    if not share:
        return None
    specs = identity.specs
    if not identity.blend:
        specs = {
            name: spec
            for name, spec in specs.items()
            if name == identity.published or spec.model == "lr"
        }
    every = config.schedule.snapshot_every
    return AsServed(
        specs,
        blend=identity.blend,
        share=share,
        delay_ms=identity.join.label_window_ms + identity.join.allowed_lateness_ms,
        every_ms=in_milliseconds(every) if in_event_time else 0,
        make=make,
    )


def _predictions(
    directory: Path | None, state_directory: Path, state: TrainingState, served: AsServed | None
) -> PredictionLog | None:
    if directory is None:
        return None
    return PredictionLog(
        directory,
        state=state_directory,
        models=state.scoreboard.models,
        served=served.names if served else (),
    )
