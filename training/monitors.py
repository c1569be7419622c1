"""--report_to and --run_name: TensorBoard, W&B or CSV files, through DeepSpeed's monitor.

    add_reports(config, args)            # the configuration gets what the flags say
    config = of_run(config, one)         # a sweep's runs have a name each
    with reporting(run): ...             # W&B: the run's name, and its end

TensorBoard and CSV write into `runs/NAME` beside --output_dir; W&B's project is WANDB_PROJECT or
nanohadpo, as its other settings are its own variables. NAME is --run_name, else the output folder's
name. What the DeepSpeed file says of monitors counts where --report_to is left out.
"""
import contextlib
import importlib
import netrc
import os

from support.command_line import first_process
from support.common import InputError, import_fault
from training.ds_file import MONITORS

REPORTS = {"tensorboard": "tensorboard", "wandb": "wandb", "csv": "csv_monitor"}
OFFLINE = "offline", "disabled", "dryrun"            # values of WANDB_MODE that need no login


def add_reports(config, args):
    """Change DeepSpeed's `config` as --report_to says. InputError for what cannot report."""
    if args.report_to is None:
        return
    for name in MONITORS:
        config.pop(name, None)
    for report in args.report_to:
        if report == "none":
            if len(args.report_to) > 1:
                raise InputError(f"--report_to {' '.join(args.report_to)}: none stands alone")
            continue
        name, first = REPORTS[report], first_process()
        if first:                                           # rank 0 alone opens monitors
            refuse_missing(report, *MONITORS[name])
        if report == "wandb":
            config[name] = {"enabled": True,
                            "project": os.environ.get("WANDB_PROJECT", "nanohadpo")}
            if first:
                refuse_without_login()
        else:
            folder = os.path.join(os.path.dirname(args.output_dir), "runs")
            config[name] = {"enabled": True, "output_path": folder, "job_name": "run"}


def refuse_missing(report, module, package):
    reason = import_fault(module)
    if reason:
        raise InputError(f"--report_to {report}: {module} cannot be imported ({reason}): pip "
                         f"install {package}, or name another")


def refuse_without_login():
    """W&B asks for its key in the middle of a run, or ends in a traceback."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE", "").lower() in OFFLINE:
        return
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = address.partition("://")[2].partition("/")[0].partition(":")[0]
    paths = os.environ.get("NETRC"), "~/.netrc", "~/_netrc"
    for path in map(os.path.expanduser, filter(None, paths)):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(host):
                return
    raise InputError(f"--report_to wandb: nobody is logged in to {host}; wandb login, or set "
                     "WANDB_API_KEY, or WANDB_MODE=offline")


def name_of(args):
    """What a run is called."""
    return args.run_name or os.path.basename(os.path.normpath(args.output_dir))


def of_run(config, args):
    """The configuration of one run: its monitors write under its own name."""
    changes = {name: config[name] | {"job_name": name_of(args)} for name in REPORTS.values()
               if name in config and name != "wandb" and (args.report_to or args.run_name)}
    return config | changes


@contextlib.contextmanager
def reporting(run):
    """DeepSpeed starts W&B and neither names nor ends it: the next run of a sweep would go on in
    the same one.
    """
    on = run.config.get("wandb", {}).get("enabled") and first_process()
    wandb = importlib.import_module("wandb") if on else None
    if wandb and getattr(wandb, "run", None) and (run.args.run_name or run.args.report_to):
        wandb.run.name = name_of(run.args)
    try:
        yield
    finally:
        if wandb:
            wandb.finish()
