import pytest
from internvl_operator import diagnose, observe


def pod(**status):
    return {"metadata": {"name": "p"}, "status": status}


def container(**state):
    return [{"name": "build", "image": "i", "state": state}]


FAULTS = [
    (
        pod(containerStatuses=container(terminated={"exitCode": 137, "reason": "OOMKilled"})),
        "OutOfMemory",
        "memory limit",
    ),
    (
        pod(initContainerStatuses=container(terminated={"exitCode": 1, "message": "a\nlast"})),
        "BuildFailed",
        "exit code 1: last",
    ),
    (
        pod(containerStatuses=container(waiting={"reason": "ErrImagePull", "message": "404"})),
        "ImagePullFailed",
        "404",
    ),
    (
        pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "no cpu"}]),
        "Unschedulable",
        "no cpu",
    ),
    (
        pod(
            conditions=[
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "message": 'persistentvolumeclaim "x" not found',
                }
            ]
        ),
        "VolumeNotBound",
        "not found",
    ),
]


@pytest.mark.parametrize(("body", "reason", "words"), FAULTS, ids=[f[1] for f in FAULTS])
def test_a_fault_gets_its_reason(body, reason, words):
    job = observe.Job(body={"metadata": {"name": "j"}}, pods=(body,))

    finding = diagnose.diagnose_job(job)

    assert finding.reason == reason
    assert words in finding.message


def test_a_job_without_pods_says_what_to_do():
    finding = diagnose.diagnose_job(observe.Job(body={"metadata": {"name": "j"}}))
    assert "delete the Job" in finding.message


def test_one_restart_is_no_crash_loop():
    ended = {"exitCode": 1}
    status = {"name": "runtime", "ready": False, "lastState": {"terminated": ended}}
    crashing = [{**status, "state": {}, "restartCount": n} for n in (1, 2)]

    assert diagnose.diagnose_serving([pod(containerStatuses=crashing[:1])]) is None
    finding = diagnose.diagnose_serving([pod(containerStatuses=crashing[1:])])
    assert finding is not None
    assert finding.reason == "CrashLoop"


def test_progress_is_the_last_line_that_tells_it():
    log = 'noise\n{"stage": "a", "step": "b", "done": 1, "total": 4}\n{"stage": 1\nmore'
    progress = observe.parse_progress(log)
    assert progress is not None
    assert progress.percent == 25
    assert observe.parse_progress("nothing") is None
