"""The last line of the sbatch script: `python -m deit.launch.aftermath STATUS`.

Processes whose partners were on a node that died end with an error, often minutes before Slurm
notices the death; the job would count as failed, not as a victim. So when training failed, every
node is looked at. If one is dead, or was in the meantime, the job goes back into the queue and on
from its last checkpoint; if all are well, the failure was the training's own and stands.
"""

from __future__ import annotations

import os
import sys

from deit.launch import slurm


def settle(status: int) -> int:
    """Requeue the job this runs in if one of its nodes is dead. Returns `status`."""
    job_id = os.environ["SLURM_JOB_ID"]
    # A job that is being cancelled, requeued or timed out fails, too, and must be left alone.
    if status == 0 or slurm.job_state(job_id) != "RUNNING":
        return status
    lost = slurm.lost_nodes(job_id)
    if lost:
        problem = slurm.requeue(job_id)
        outcome = f"cannot be requeued: {problem}" if problem else "is back in the queue"
        names = ", ".join(lost)
        print(f"lost {names}; job {job_id} {outcome}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(settle(int(sys.argv[1])))
