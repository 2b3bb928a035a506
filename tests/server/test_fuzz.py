"""Requests that schemathesis makes up from `/openapi.json`, valid and invalid: answered as it says, without a crash."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from mara_integrations.runtime import MARAEngine
from mara_integrations.server import create_app
from mara_integrations.server.openapi import openapi
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


DESCRIBED = schemathesis.openapi.from_dict(openapi(has_key=False))


@pytest.fixture(scope="module")
def served():
    """A server whose replies are short, because its context window is."""
    engine = MARAEngine((tiny_model(max_position_embeddings=96), tiny_tokenizer())).load()
    return create_app(engine, {"brand": random_head(32, "residual")}, name="tiny")


@DESCRIBED.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_server_answers_as_it_says(case, served):
    case.validate_response(case.call(app=served, timeout=20), checks=CHECKS)


@pytest.mark.slow
@DESCRIBED.parametrize()
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_server_answers_hundreds_of_requests_as_it_says(case, served):
    case.validate_response(case.call(app=served, timeout=20), checks=CHECKS)
