"""Command ``gm-mlic dashboard``: a W&B workspace for runs logged with ``logger=wandb``."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gm_mlic.errors import ConfigError
from gm_mlic.io import first_line, write_file


def build_workspace(entity: str, project: str) -> Any:
    """The workspace: curves, sweeps, ablations, labels and photos, as logged by :mod:`gm_mlic.training.tracking`."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ConfigError("The dashboard needs wandb-workspaces: pip install 'gm-mlic[wandb]'.") from error

    def sweep(key: str, title: str) -> Any:
        return wr.ScatterPlot(title=title, x=wr.Config(key), y=wr.SummaryMetric("test/mAP"), regression=False)

    # define_metric(summary="max") stores the maximum as NAME.max.
    columns: list[Any] = [
        wr.Config("graph.m"), wr.Config("model.k"), wr.Config("model.fusion"), wr.Config("ablation"),
        wr.Config("optimizer.lr"), wr.SummaryMetric("val/mAP.max"), wr.SummaryMetric("test/mAP"),
    ]  # fmt: skip
    by_ablation: dict[str, Any] = {
        "groupby": wr.Config("ablation"),
        "groupby_aggfunc": "mean",
        "groupby_rangefunc": "stddev",
    }
    sections = {
        "Training": [
            wr.LinePlot(title="val mAP", x="epoch", y=["val/mAP"]),
            wr.LinePlot(title="loss", x="epoch", y=["train/loss", "val/loss"]),
            wr.LinePlot(title="val CF1 and OF1", x="epoch", y=["val/CF1", "val/OF1"]),
        ],
        "Sweeps": [
            sweep("graph.m", "test mAP by m"),
            sweep("model.k", "test mAP by k"),
            wr.ParallelCoordinatesPlot(
                title="settings and mAP", columns=[wr.ParallelCoordinatesPlotColumn(metric=c) for c in columns]
            ),
        ],
        "Ablation": [
            wr.BarPlot(title="test mAP", metrics=["test/mAP"], **by_ablation),
            wr.BarPlot(title="test CF1", metrics=["test/CF1"], **by_ablation),
        ],
        "Labels and photos": [
            wr.WeavePanelSummaryTable(table_name="test/AP"),
            wr.WeavePanelSummaryTable(table_name="test/photos"),
        ],
    }
    opened = [ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()]
    return ws.Workspace(entity=entity, project=project, name="GM-MLIC", sections=opened)


def dashboard(config: DictConfig) -> None:
    """Save the workspace at W&B; without a login, write its definition to ``config.out``."""
    try:
        import wandb
        from requests.utils import get_netrc_auth  # of a package that wandb needs
    except ImportError as error:
        raise ConfigError("The dashboard needs W&B: pip install 'gm-mlic[wandb]'.") from error
    offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")
    entity = config.entity
    # `wandb login` writes its key to the netrc file.
    if not offline and (os.environ.get("WANDB_API_KEY") or get_netrc_auth(str(wandb.setup().settings.base_url))):
        try:
            api = wandb.Api(timeout=20)
            entity = entity or api.default_entity
            workspace = build_workspace(entity, config.project).save()
        except Exception as error:  # W&B passes on errors of its HTTP library
            raise ConfigError(
                f"saving the workspace at W&B failed ({first_line(error)}): check the network, entity and project, or "
                "set WANDB_MODE=offline to write its definition to a file."
            ) from error
        print(f"dashboard: {workspace.url}")
        return
    out = Path(config.out)
    workspace = build_workspace(entity or "ENTITY", config.project)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    write_file(out, json.dumps(content, indent=2) + "\n")
    print(f"dashboard: definition in {out}; to save it at W&B, run `wandb login` and then this command again.")
