"""What the tests of the HTTP side share: an app over a service that says what a test tells it to, and a client of it.

A file over another service has a `service` and an `address` of its own, which the client is then one of.
"""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
import serving
from serving import Scripted, says


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Scripted, str]]:
    service = Scripted()
    with serving.serving(service, max_new_tokens=50, seconds=30.0, body=20_000, facts={"policy": "full()"}) as address:
        yield service, address


@pytest.fixture
def service(served: tuple[Scripted, str]) -> Iterator[Scripted]:
    made = served[0]
    yield made
    made.script, made.refusal = says("Hello."), None
    made.jobs.clear()
    made.cancelled.clear()


@pytest.fixture
def address(served: tuple[Scripted, str], service: Scripted) -> str:
    return served[1]


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made
