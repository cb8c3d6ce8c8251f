import torch

from laconic.training.checkpoint import FILE, Checkpoint


def test_what_a_killed_process_left_goes_with_the_next_state(tmp_path):
    (tmp_path / f".{FILE}.0123abcd.part").write_bytes(b"half")
    Checkpoint(identity="run", state={"step": 1}, tensors={"a": torch.ones(2)}).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
