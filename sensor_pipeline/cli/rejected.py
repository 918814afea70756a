"""`sensor-pipeline rejected`: `list`, `show` and `replay`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from rich.cells import cell_len

from sensor_pipeline.cli.environment import environment
from sensor_pipeline.cli.moment import Moment
from sensor_pipeline.cli.printable import cut, pad, printable
from sensor_pipeline.cli.progress import progress
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.rejected_search import Filter, Kept, Listed, count, find, find_topics, newest
from sensor_pipeline.postgres.verify import SNAPSHOT
from sensor_pipeline.replay import Replay
from sensor_pipeline.settings import Settings

_HEAD = ("topic", "part", "offset", "reason", "first seen (UTC)", "bytes", "detail")
_RIGHT = {"part", "offset", "bytes"}
_GAP = "  "
# A narrow terminal cuts the topic's name down to this, and then leaves the details out rather than show less of them.
_SHORTEST_TOPIC = 8
_SHORTEST_DETAIL = 12
# Of a detail, where the output is no terminal.
_LONGEST_DETAIL = 200
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@click.group("rejected")
def command() -> None:
    """Rejected messages: list them, show one whole, and replay them once their cause is mended."""


def _filtered(function: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.option("--reason", "reasons", multiple=True, help="Only of this reason; may be given several times."),
        click.option("--topic", "topics", multiple=True, help="Only of this topic; may be given several times."),
        click.option("--since", type=Moment(), help="Only first seen from then on: ISO 8601, or 7 days."),
        click.option("--until", type=Moment(), help="Only first seen up to then."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@command.command("list")
@_filtered
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Show at most so many.")
def list_(limit: int, **filters: Any) -> None:
    """List the newest rejected messages, a line each, and how many there are of each reason."""
    wanted = Filter(**filters)
    database = _database()
    with database.begin() as connection:
        connection.execute(SNAPSHOT)
        database.check_schema(connection)
        find_topics(connection, wanted)
        counts = count(connection, wanted)
        messages = newest(connection, wanted, limit)
    if not messages:
        click.echo("no rejected message" + (" that the filters let through" if wanted != Filter() else ""))
        return
    for line in _table(messages, shutil.get_terminal_size().columns if sys.stdout.isatty() else None):
        click.echo(line)
    total = sum(counts.values())
    if total > limit:
        click.echo(f"… and {total - limit:,} older ones; --limit shows more")
    click.echo(f"\n{total:,} rejected messages")
    width = len(f"{max(counts.values()):,}")
    for reason, number in counts.items():
        click.echo(f"  {number:>{width},}  {reason}")


@command.command("show")
@click.argument("topic")
@click.argument("partition", type=click.IntRange(min=0))
@click.argument("offset", type=click.IntRange(min=0))
def show(topic: str, partition: int, offset: int) -> None:
    r"""Show one rejected message whole.

    What is no text stands as \xff, and what would steer the terminal as \x1b.
    """
    database = _database()
    with database.begin() as connection:
        database.check_schema(connection)
        found = find(connection, topic, partition, offset)
    click.echo("\n\n".join("\n".join(_described(kept)) for kept in found))


@command.command("replay")
@_filtered
@click.option("--dry-run", is_flag=True, help="Write nothing: only say what would become of them.")
def replay(dry_run: bool, **filters: Any) -> None:
    """Try rejected messages again: by today's rules and settings, those that are in order become readings.

    Failures are recomputed as for late readings. What is bad again stays as it is. Safe to run again, and while
    ingestion goes on.
    """
    work = Replay(Settings.from_env(environment()), Filter(**filters), dry_run=dry_run)
    with progress() as (bar, say):
        task = bar.add_task("rejected messages", total=work.total)
        outcome = work.run(lambda messages: bar.advance(task, messages))
        for reason, number in outcome.bad_again.most_common():
            say(f"bad again: {number:,} {reason}, such as")
            for sample in outcome.samples[reason]:
                place = f"{sample.topic} {sample.partition} {sample.offset}"
                say(f"  {place}: {cut(printable(sample.detail), _LONGEST_DETAIL)}")
    click.echo(outcome.sentence(dry_run=dry_run))


def _database() -> Database:
    return Database(Settings.from_env(environment()))


def _table(messages: Sequence[Listed], columns: int | None) -> Iterator[str]:
    """The lines of a table that is at most so many columns wide (None: as wide as it gets)."""
    rows = [_HEAD, *map(_cells, messages)]
    widths = [max(map(cell_len, cells)) for cells in zip(*rows, strict=True)]
    if columns is not None:
        widths = _fit(widths, columns)
    for row in rows:
        cells = (
            pad(_topic(cell, width) if at == 0 else cut(cell, width), width, right=name in _RIGHT)
            for at, (cell, width, name) in enumerate(zip(row, widths, _HEAD, strict=False))
        )
        yield _GAP.join(cells).rstrip()


def _fit(widths: list[int], columns: int) -> list[int]:
    room = columns - sum(widths[:-1]) - len(_GAP) * (len(widths) - 1)
    give = min(max(_SHORTEST_DETAIL - room, 0), max(widths[0] - _SHORTEST_TOPIC, 0))
    if room + give < _SHORTEST_DETAIL:
        # Without the details, and the gap before them.
        give = min(max(-room - len(_GAP), 0), max(widths[0] - _SHORTEST_TOPIC, 0))
        return [widths[0] - give, *widths[1:-1]]
    return [widths[0] - give, *widths[1:-1], min(widths[-1], room + give)]


def _topic(name: str, width: int) -> str:
    """Names differ at their end."""
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]


def _cells(message: Listed) -> tuple[str, ...]:
    return (
        printable(message.topic),
        str(message.partition),
        str(message.offset),
        message.reason,
        f"{message.first_seen:%Y-%m-%d %H:%M}",
        "none" if message.bytes is None else f"{message.bytes:,}",
        cut(printable(message.detail), _LONGEST_DETAIL),
    )


def _described(kept: Kept) -> Iterator[str]:
    yield f"topic       {printable(kept.topic)}, of Kafka's id {printable(kept.kafka_topic_id)}"
    yield f"partition   {kept.partition}"
    yield f"offset      {kept.offset}"
    yield f"reason      {kept.reason}"
    yield f"detail      {printable(kept.detail)}"
    yield f"first seen  {kept.first_seen:%Y-%m-%d %H:%M:%S} UTC"
    yield f"Kafka time  {_record_time(kept.timestamp_ms)}"
    yield "key         " + ("none" if kept.key is None else printable(kept.key))
    yield "headers     " + ("" if kept.headers else "none")
    for name, value in kept.headers:
        yield f"  {printable(name)}: " + ("none" if value is None else printable(value))
    if kept.payload is None:
        yield "payload     none: a tombstone"
        return
    yield f"payload     {len(kept.payload):,} bytes"
    # Indented, so that no line of it passes for one of these.
    yield from (f"  {printable(line)}" for line in kept.payload.split(b"\n"))


def _record_time(timestamp_ms: int | None) -> str:
    if timestamp_ms is None:
        return "not kept: the message was rejected by an older version"
    if timestamp_ms < 0:
        return "none"
    try:
        return f"{_EPOCH + timedelta(milliseconds=timestamp_ms):%Y-%m-%d %H:%M:%S.%f}"[:-3] + " UTC"
    except OverflowError:
        return f"{timestamp_ms} ms after 1970"
