"""What tests of several training methods ask in the same way."""

import pytest
import torch

from laconic.core.task import classification


@pytest.fixture
def resumes(tmp_path):
    """Checks that a run cut off at a `part` of its batches goes on to the very same end."""

    def check(run, task, part):
        told, fail_at = [], None

        def split(batch):
            told.append(0)
            if len(told) == fail_at:
                raise RuntimeError("power cut")
            return (batch[0],), batch[1]

        counted = classification(train=task.train, validation=task.validation, split=split)
        whole = run(counted)
        fail_at = round(len(told) * part)
        told.clear()
        with pytest.raises(RuntimeError, match="power cut"):
            run(counted, workdir=tmp_path)
        fail_at = None
        again = run(counted, workdir=tmp_path)
        first, second = (dict(made.program.tensors()) for made in (whole, again))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert again.figures == {**whole.figures, "seconds": again.figures["seconds"]}

    return check
