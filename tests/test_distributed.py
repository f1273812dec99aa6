from __future__ import annotations

import pytest

from gm_mlic.distributed import RankInfo, launcher, rank_info

STARTERS = {
    None: ({"WORLD_SIZE": "4", "SLURM_NTASKS": "4"}, RankInfo(0, 1, 0)),
    "torchrun": (
        {"TORCHELASTIC_RUN_ID": "none", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_NTASKS": "2",
         "SLURM_PROCID": "1", "SLURM_LOCALID": "0"},
        RankInfo(5, 8, 1),
    ),
    "srun": (
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_NAME": "train"},
        RankInfo(3, 4, 1),
    ),
    "lightning": ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, RankInfo(1, 2, 1)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for variables, _ in STARTERS.values():
        for name in variables:
            monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("starter", STARTERS)
def test_rank_info(monkeypatch, starter):
    variables, expected = STARTERS[starter]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launcher() == starter
    assert rank_info() == expected


def test_lightning_without_world_size(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank_info().rank == 1


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_interactive_slurm_shell_is_a_single_process(monkeypatch, name):
    for key, value in STARTERS["srun"][0].items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("SLURM_JOB_NAME", name)
    assert rank_info() == RankInfo()
