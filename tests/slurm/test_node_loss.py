"""A node is lost in the middle of a training. By itself, as it takes Slurm minutes to notice."""

import time

from jobs import MARKS, Job, assert_same_training

pytestmark = MARKS


def test_node_that_dies_is_survived_from_the_last_checkpoint(submit, undisturbed: Job):
    job = submit(wait=True)
    job.cluster.kill_node("n2")
    # Slurm notices after SlurmdTimeout; should the survivors fail before that, their job waits.
    job.wait_until(lambda: job.restarts() == 1, "requeue", 180)
    # The controller still tells the dead node to end the job, which must not be the next start.
    job.cluster.query("scontrol", "hold", job.id, check=True)
    job.cluster.start_node("n2")
    time.sleep(20)
    job.cluster.query("scontrol", "release", job.id, check=True)
    job.wait_for_end()
    assert job.restarts() == 1
    assert job.stops() == []
    assert "going on at epoch 2, step 0" in job.log
    assert_same_training(job, undisturbed)
