"""What the pages of the UI ask of the web server, in short: as many rows, by the same filters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sensor_pipeline.bench.running import Up
from sensor_pipeline.errors import UnavailableError

_RUNS = """
    query Runs($filter: RunsFilter) {
        runsFeedOrError(limit: 30, filter: $filter, view: ROOTS) {
            ... on RunsFeedConnection { results { id runStatus creationTime jobName tags { key value } } }
        }
        queued: runsFeedCountOrError(filter: {statuses: [QUEUED]}, view: RUNS) { ... on RunsFeedCount { count } }
        started: runsFeedCountOrError(filter: {statuses: [STARTED]}, view: RUNS) { ... on RunsFeedCount { count } }
    }
"""
_RUN = """
    query Run($id: ID!) {
        runOrError(runId: $id) {
            ... on Run { status stepStats { stepKey status } assets { id } eventConnection { events { __typename } } }
        }
    }
"""
_TICKS = """
    query Ticks($sensor: InstigationSelector!) {
        instigationStateOrError(instigationSelector: $sensor) {
            ... on InstigationState { ticks(limit: 26) { timestamp status cursor skipReason runs { id status } } }
        }
    }
"""
_SENSORS_PAGE = """
    query Sensor($sensor: SensorSelector!) {
        sensorOrError(sensorSelector: $sensor) {
            ... on Sensor {
                nextTick { timestamp }
                sensorState {
                    status runningCount
                    typeSpecificData { ... on SensorData { lastCursor } }
                    runs(limit: 1) { id status startTime endTime }
                    ticks(limit: 1) { timestamp status cursor skipReason runs { id status } }
                }
            }
        }
        instance { daemonHealth { daemonStatus(daemonType: "SENSOR") { healthy } } }
    }
"""
_TAGS = """
    query Tags($keys: [String!]!) {
        runTagKeysOrError { ... on RunTagKeys { keys } }
        runTagsOrError(tagKeys: $keys) { ... on RunTags { tags { key values } } }
    }
"""
_PLOTS = """
    query Plots($asset: AssetKeyInput!) {
        assetOrError(assetKey: $asset) {
            ... on Asset {
                assetMaterializations(limit: 100) {
                    timestamp metadataEntries { label ... on FloatMetadataEntry { floatValue } }
                }
            }
        }
    }
"""
_LATEST = "SELECT run_id FROM runs WHERE pipeline_name = 'ingest_batch' AND status = 'SUCCESS' ORDER BY id DESC LIMIT 1"
_REPOSITORY = {"repositoryLocationName": "sensor_pipeline", "repositoryName": "__repository__"}
_LAUNCH = """
    mutation Launch($run: ExecutionParams!) {
        launchRun(executionParams: $run) {
            ... on LaunchRunSuccess { run { runId } }
            ... on Error { message }
        }
    }
"""


def runs(up: Up) -> Any:
    """The first page of runs, and the counts beside it."""
    return up.ask_ui(_RUNS)


def runs_by_tag(up: Up) -> Any:
    """The first page of those with a tag."""
    return up.ask_ui(_RUNS, filter={"tags": [{"key": "outcome", "value": "ingested"}]})


def run(up: Up) -> Any:
    """The latest run's page."""
    return up.ask_ui(_RUN, id=up.ask(_LATEST)[0][0])


def ticks(up: Up) -> Any:
    """The sensor's ticks, with what became of their runs."""
    return up.ask_ui(_TICKS, sensor={**_REPOSITORY, "name": "backlog_sensor"})


def sensors_page(up: Up) -> Any:
    """The sensor itself, with its last tick and its last run."""
    return up.ask_ui(_SENSORS_PAGE, sensor={**_REPOSITORY, "sensorName": "backlog_sensor"})


def tags(up: Up) -> Any:
    """What the filter of the runs page offers: the tags, and the values of one."""
    return up.ask_ui(_TAGS, keys=["outcome"])


def plots(up: Up) -> Any:
    """The numbers of the latest batches, on the page of the asset `readings`."""
    return up.ask_ui(_PLOTS, asset={"path": ["readings"]})


PAGES: dict[str, Callable[[Up], Any]] = {
    "the runs page": runs,
    "the runs page by a tag": runs_by_tag,
    "a run's page": run,
    "the sensor's page": sensors_page,
    "the sensor's ticks": ticks,
    "an asset's plots": plots,
    "the tags to filter by": tags,
}


def launch(up: Up, job: str) -> str:
    """Launch a job with nothing to configure, as its Launchpad does; the run's id.

    Raises:
        UnavailableError: with what the web server said instead.
    """
    selector = {**_REPOSITORY, "pipelineName": job}
    answer = up.ask_ui(_LAUNCH, run={"selector": selector, "runConfigData": {}, "mode": "default"})["launchRun"]
    if "run" not in answer:
        raise UnavailableError(f"{job} could not be launched: {answer.get('message', answer)}")
    return str(answer["run"]["runId"])
