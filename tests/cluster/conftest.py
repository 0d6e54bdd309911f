"""Fixtures of the cluster tests: the installed operator, and a namespace for each test.

The tests own the local cluster: they take it down and bring it up as they need.
"""

import uuid

import pytest
from cluster_client import Client
from demo import product
from demo import target as targets
from local_cluster import cluster, layout


@pytest.fixture(scope="session")
def target():
    chosen = targets.choose_target()
    if chosen.is_local:
        cluster.up(layout.default_layout(), cluster.Gpus())
        chosen = targets.choose_target()
    return chosen


@pytest.fixture(scope="session")
def images(target):
    return product.build_images(target)


@pytest.fixture(scope="session")
def operator(target, images):
    product.install(target, images)
    return target


@pytest.fixture
def client(operator, images):
    name = f"test-{uuid.uuid4().hex[:8]}"
    product.ensure_namespace(operator, name)
    made = Client(operator, name, images)
    yield made
    operator.run_kubectl("delete", "namespace", name, "--wait=false")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" and report.failed:
        client = item.funcargs.get("client")
        if client is not None:
            report.sections.append(("the cluster's story", client.tell_story()))
    return report
