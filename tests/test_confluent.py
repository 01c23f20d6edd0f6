"""The source of confluent-kafka: what holds of kafka-python's holds of it."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_connectors
from click.testing import CliRunner
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from support.brokers import SASL_PASSWORD, SASL_USER, ApacheBroker, make_certificates
from support.lineage import SMALL, newest
from support.patience import PATIENCE_SECONDS
from support.topics import produced
from test_connectors import (  # noqa: F401 - these run here too
    count,
    damaged,
    news_may_take_long,
    numbered,
    open_source,
    poll_until,
    read_nothing,
    refusal,
    rows,
    test_a_damaged_batch_of_a_partition_that_is_paused_meanwhile_is_still_told,
    test_a_frozen_broker_shows_as_silence_and_a_thawed_one_does_not,
    test_a_live_source_catches_up_and_sees_what_comes_later,
    test_a_missing_topic_is_named_with_what_is_near_and_how_to_create_it,
    test_a_password_logs_in_and_never_appears_in_a_log,
    test_a_position_beyond_a_topic_that_was_created_again_is_told_as_that,
    test_a_refused_login_and_missing_tls_are_told_apart_from_silence,
    test_a_second_source_resumes_from_the_positions_of_the_first,
    test_a_source_goes_on_exactly_where_it_is_sent,
    test_a_topic_that_is_created_again_or_gets_partitions_is_told,
    test_committed_offsets_are_written_and_never_read,
    test_every_partition_is_read_once_in_order_as_raw_bytes_and_nulls,
    test_options_of_one_client_do_not_disturb_the_other,
    test_partitions_without_records_are_not_silent,
    test_paused_partitions_wait_while_the_others_flow,
    test_reading_goes_on_when_a_killed_broker_comes_back,
    test_records_between_transactions_and_of_aborted_ones_are_skipped,
    test_records_that_retention_deleted_are_an_error_with_their_number,
    test_several_topics_keep_the_order_they_were_given_in,
    test_the_end_of_a_log_is_the_end_of_its_last_batch,
    test_two_transactional_producers_and_a_plain_one_leave_what_was_committed,
    test_until_end_stops_at_the_end_of_the_start_while_a_producer_goes_on,
    test_values_up_to_the_limit_are_whole,
    write,
)

import stream_ctr.connectors.kafka.confluent
import stream_ctr.connectors.kafka.diagnosis
from stream_ctr.cli.main import main
from stream_ctr.connectors.kafka.confluent import ConfluentSource
from stream_ctr.connectors.errors import (
    KafkaOptionError,
    KafkaReadFailed,
    KafkaRefused,
    KafkaUnreachable,
    PositionLost,
    TopicChanged,
)
from stream_ctr.connectors.kafka import KafkaSink, client_options, ensure_topic, topic_partitions
from stream_ctr.connectors.kafka.options import _LIBRDKAFKA, _OPTIONS, librdkafka_options

pytest.importorskip("confluent_kafka")


@pytest.fixture(autouse=True)
def _the_tests_of_the_other_source_open_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_connectors, "KafkaSource", ConfluentSource)
    # What they set in the module of the source, they set in this one's.
    theirs = SimpleNamespace(
        kafka=stream_ctr.connectors.kafka.confluent, kafka_diagnosis=stream_ctr.connectors.kafka.diagnosis
    )
    monkeypatch.setattr(test_connectors, "stream_ctr", SimpleNamespace(connectors=theirs))


def test_a_poll_ends_when_its_values_have_many_bytes(
    embedded_broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_ctr.connectors.kafka.confluent, "POLL_BYTES", 100_000)
    monkeypatch.setattr(stream_ctr.connectors.kafka.confluent, "_AT_ONCE", 5)
    write(embedded_broker, topic, 1, [[b"%d " % index + bytes(10_000) for index in range(100)]])
    with open_source(embedded_broker, topic) as source:
        polls = []
        while not source.finished:
            polls.append(source.poll(1.0))
    assert (
        max(map(len, polls)) < 10 + 5
    )  # the tenth reaches the bound, its piece is read to the end
    assert [offset for records in polls for offset in records.offset.tolist()] == list(range(100))


# What is lost or damaged


@pytest.mark.slow
def test_what_was_deleted_is_passed_over_and_counted_when_that_is_wanted(
    kafka_broker: str, topic: str
) -> None:
    write(kafka_broker, topic, 2, numbered([100, 100]))
    options = {"max.poll.records": "10"}
    with (
        closing(KafkaAdminClient(bootstrap_servers=kafka_broker)) as admin,
        open_source(kafka_broker, topic, options=options, on_lost="skip") as skipping,
        open_source(kafka_broker, topic, options=options) as stopping,
    ):
        first = rows(skipping, lambda: skipping.positions()[1] > 0)
        skipping.pause({1})  # what the client had fetched of it is dropped
        read = skipping.positions()[1]
        admin.delete_records({TopicPartition(topic, 1): 60})
        skipping.pause(())
        second = rows(skipping, lambda: skipping.finished)
        assert 0 < read < 60
        assert skipping.lost() == {0: 0, 1: 60 - read}
        assert [offset for offset, _, _ in first.get(1, []) + second[1]] == [
            *range(read),
            *range(60, 100),
        ]
        stopping.seek({0: 5, 1: 10}, skip_lost=True)
        assert (stopping.positions(), stopping.lost()) == ({0: 5, 1: 60}, {0: 0, 1: 50})
        with pytest.raises(
            PositionLost, match="partition 0 of topic .* ends at offset 100, but 101 comes next"
        ):
            stopping.seek({0: 101}, skip_lost=True)


@pytest.mark.slow
def test_a_damaged_batch_stops_reading_where_it_is_or_is_passed_over(
    apache: ApacheBroker,
    damaged: str,  # noqa: F811
) -> None:  # noqa: F811
    with open_source(apache.bootstrap_servers, damaged) as source:
        found = rows(source, lambda: source.positions()[0] == 10)[0]
        assert [value for _, _, value in found] == [b"value %d" % index for index in range(10)]
        for _ in range(2):  # it neither hangs nor goes on
            with pytest.raises(
                KafkaReadFailed,
                match=f"partition 0 of topic '{damaged}' cannot be read on at offset 10: ",
            ):
                poll_until(source, lambda: False)
            assert source.positions()[0] == 10
    with open_source(apache.bootstrap_servers, damaged, on_lost="skip") as source:
        offsets = [offset for offset, _, _ in rows(source, lambda: source.finished)[0]]
        assert offsets == [*range(10), *range(20, 30)]
        assert source.lost() == {0: 10, 1: 0}
        source.seek({0: 13})
        assert [offset for offset, _, _ in rows(source, lambda: source.finished)[0]] == [
            *range(20, 30)
        ]


@pytest.mark.slow
def test_a_batch_that_expands_beyond_the_limit_is_damage(
    kafka_broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        stream_ctr.connectors.kafka.confluent._RULES, "receive.message.max.bytes", 4 << 20
    )
    client = client_options(kafka_broker, {"max.request.size": str(1 << 30)})
    ensure_topic(client, topic)
    with closing(KafkaSink(client, compression="zstd")) as sink:
        for value in (bytes(3 << 20), bytes(5 << 20), b"after"):
            sink.send(topic, value)
            sink.flush(PATIENCE_SECONDS)
    options = {"fetch.max.bytes": str(2 << 20)}
    with (
        open_source(kafka_broker, topic, options=options) as source,
        pytest.raises(KafkaReadFailed, match="cannot be read on at offset 1"),
    ):
        rows(source, lambda: source.finished)
    with open_source(
        kafka_broker, topic, options=options, on_lost="skip", max_record_bytes=10
    ) as source:
        found = rows(source, lambda: source.finished)[0]
        assert source.lost() == {0: 1}
    assert [(offset, value) for offset, _, value in found] == [(0, bytes(11)), (2, b"after")]


@pytest.mark.slow
@pytest.mark.parametrize("comes", [True, False], ids=["news", "no news"])
def test_nothing_is_read_of_a_log_that_grows_past_a_position_that_it_did_not_hold(
    comes: bool,
    kafka_broker: str,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if comes:
        request.getfixturevalue("news_may_take_long")
    write(kafka_broker, topic, 1, numbered([50]))
    admin = KafkaAdminClient(bootstrap_servers=kafka_broker)
    with (
        closing(admin),
        open_source(
            kafka_broker, topic, until_end=False, topic_check_seconds=1e6, on_lost="skip"
        ) as source,
    ):
        poll_until(source, lambda: source.positions() == {0: 50})
        source.pause({0})
        source.poll(0.5)
        with monkeypatch.context() as slow_news:
            slow_news.setattr(source._cluster, "described", lambda _: None)
            admin.delete_topics([topic])
            write(kafka_broker, topic, 1, numbered([3]))
            source.pause(())
            poll_until(source, lambda: source._doubt is not None)
            write(kafka_broker, topic, 1, numbered([100]))
            if not comes:
                with pytest.raises(PositionLost, match="created again"):
                    read_nothing(source)
                return
            assert not len(source.poll(0.5))
        with pytest.raises(TopicChanged, match="was deleted and created again"):
            read_nothing(source)


@pytest.mark.slow
def test_a_topic_that_is_deleted_is_told_after_a_while_and_not_created(
    kafka_broker: str, topic: str
) -> None:
    # Not on the embedded broker: Tansu 0.6 answers a fetch from a deleted topic with a leader and no name, and librdkafka 2.16.0 crashes.
    write(kafka_broker, topic, 1, numbered([5]))
    with (
        closing(KafkaAdminClient(bootstrap_servers=kafka_broker)) as admin,
        open_source(kafka_broker, topic, until_end=False, topic_check_seconds=0.2) as source,
    ):
        poll_until(source, lambda: source.positions() == {0: 5})
        source._topics._known._missing_seconds = 1.0
        admin.delete_topics([topic])
        started = time.monotonic()
        with pytest.raises(TopicChanged, match=f"topic '{topic}' was deleted while it was read"):
            poll_until(source, lambda: False)
        assert time.monotonic() - started > 0.9
    assert topic_partitions(client_options(kafka_broker, {}), topic) is None


# When nothing answers


def test_an_unreachable_broker_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_ctr.connectors.kafka.confluent, "BOOTSTRAP_SECONDS", 0.3)
    with pytest.raises(
        KafkaUnreachable,
        match="no Kafka broker answered within 0.3 s .*127.0.0.1:1: connection refused",
    ):
        ConfluentSource(["clicks"], client=client_options("127.0.0.1:1", {}), group="g")


def test_a_tls_client_does_not_hang_at_a_silent_peer(
    embedded_broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_ctr.connectors.kafka.confluent, "BOOTSTRAP_SECONDS", 0.3)
    with pytest.raises(KafkaRefused, match="accepts connections, but let nobody in"):
        ConfluentSource(
            ["t"], client=client_options(embedded_broker, {"security.protocol": "SSL"}), group="g"
        )


@pytest.mark.slow
def test_tls_with_a_scram_login_carries_records_and_a_refusal_names_its_cause(
    apache: ApacheBroker, topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {
        "security.protocol": "SASL_SSL", "sasl.mechanism": "SCRAM-SHA-256", "sasl.username": SASL_USER, "sasl.password": SASL_PASSWORD,
        "ssl.ca.location": str(apache.ca),
    }  # fmt: skip
    write(apache.bootstrap_servers, topic, 1, numbered([2000]))
    with open_source(apache.tls_servers, topic, options=good) as source:
        assert count(rows(source, lambda: source.finished)) == 2000
    make_certificates(tmp_path)
    by_address = apache.tls_servers.replace("localhost", "127.0.0.1")
    other_authority = {"ssl.ca.location": str(tmp_path / "ca.pem")}
    for servers, options, expected in (
        (
            apache.tls_servers,
            {"sasl.password": "another-" + SASL_PASSWORD},
            "the login was refused, check sasl.username",
        ),
        (
            apache.tls_servers,
            other_authority,
            "the certificate is not of an authority that is trusted here",
        ),
        (by_address, {}, "the certificate is .*another host's"),
    ):
        error = refusal(servers, good | options, topic, expected, monkeypatch)
        assert SASL_PASSWORD not in f"{error!r} {error.__cause__!r}"


# Options


def test_every_option_of_a_consumer_has_a_name_in_librdkafka() -> None:
    known = {name for name, _ in _OPTIONS.values() if name in KafkaConsumer.DEFAULT_CONFIG}
    assert known - _LIBRDKAFKA.keys() == {
        "group_id",
        "max_poll_records",
    }  # there is no group; a poll is not librdkafka's


def test_every_option_is_taken_by_librdkafka(embedded_broker: str, topic: str) -> None:
    ensure_topic(client_options(embedded_broker, {}), topic)
    values = {
        "client.id": "c", "client.dns.lookup": "use_all_dns_ips", "connections.max.idle.ms": "600000",
        "max.in.flight.requests.per.connection": "5", "metadata.max.age.ms": "10000", "receive.buffer.bytes": "100000",
        "reconnect.backoff.ms": "10", "reconnect.backoff.max.ms": "2000", "request.timeout.ms": "10000", "retry.backoff.ms": "50",
        "send.buffer.bytes": "100000", "client.rack": "r", "fetch.max.bytes": "2000000", "fetch.max.wait.ms": "10", "fetch.min.bytes": "1",
        "max.partition.fetch.bytes": "1000", "acks": "1", "retries": "3", "compression.type": "gzip",
        "max.poll.records": "2000000",
    }  # fmt: skip
    with open_source(embedded_broker, topic, options=values) as source:
        assert source.finished


def test_a_secret_is_whole_for_the_client_and_names_are_its_own() -> None:
    options = {
        "security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN", "sasl.username": "u", "sasl.password": "hidden",
        "ssl.endpoint.identification.algorithm": "",
    }  # fmt: skip
    assert librdkafka_options(client_options("a:1,b:2", options)) == {
        "bootstrap.servers": "a:1,b:2", "security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN", "sasl.username": "u",
        "sasl.password": "hidden", "ssl.endpoint.identification.algorithm": "none",
    }  # fmt: skip


def test_what_this_client_cannot_do_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    aws = client_options("a:1", {"security.protocol": "SASL_SSL", "sasl.mechanism": "AWS_MSK_IAM"})
    with pytest.raises(
        KafkaOptionError, match="AWS_MSK_IAM, which the client confluent does not have"
    ):
        ConfluentSource(["t"], client=aws, group="g")
    for options, message in (
        (
            {"security.protocol": "SASL_SSL", "sasl.mechanism": "GSSAPI"},
            "does not take its options: .*GSSAPI",
        ),
        ({"fetch.max.wait.ms": "-1"}, 'does not take its options: .*"fetch.wait.max.ms"'),
        (
            {"security.protocol": "SSL", "ssl.cipher.suites": "none such"},
            "does not take its options: .*cipher",
        ),
    ):
        with pytest.raises(KafkaOptionError, match=message):
            ConfluentSource(["t"], client=client_options("127.0.0.1:1", options), group="g")


def test_without_the_library_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    monkeypatch.setitem(sys.modules, "confluent_kafka.admin", None)
    done = CliRunner().invoke(
        main, ["run", "--client", "confluent", "--state", str(tmp_path / "state")]
    )
    assert done.exit_code == 3
    assert "pip install 'stream-ctr[confluent]'" in done.output


# Learning


@pytest.mark.slow
def test_a_run_may_change_its_client_and_ends_alike(
    kafka_broker: str, topic: str, tmp_path: Path
) -> None:
    def run(state: str, client: str) -> None:
        arguments = [
            "run",
            "--topic",
            topic,
            "--bootstrap-servers",
            kafka_broker,
            "--until-end",
            "--client",
            client,
        ]
        done = CliRunner().invoke(main, [*arguments, "--state", str(tmp_path / state), *SMALL])
        assert done.exit_code == 0, done.output

    clients = {
        "neither": ("kafka-python", "kafka-python"),
        "to": ("kafka-python", "confluent"),
        "from": ("confluent", "kafka-python"),
    }
    for number in range(2):
        produced(kafka_broker, topic, slice(3000 * number, 3000 * (number + 1)))
        for state, client in clients.items():
            run(state, client[number])
    first, *others = (newest(tmp_path / state) for state in clients)
    assert first
    for other in others:
        assert other
        assert (other.examples, other.ledger, other.positions) == (
            first.examples,
            first.ledger,
            first.positions,
        )
        assert other.weights_sha256 == first.weights_sha256
        assert other.same(first, "model", "optimizer", "baseline")
    assert first.examples > 2000
