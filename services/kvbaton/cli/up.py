"""`kvbaton up`: a deployment in the foreground."""

import asyncio

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvbaton.cli.deployment import Deployment, UpConfig, deployed
from kvbaton.engine.errors import StartupError
from kvbaton.rpc.errors import root_cause
from kvbaton.rpc.serving import run, termination_event

_COLOURS = {"prefill": "cyan", "decode": "green", "router": "magenta"}


def run_up(config: UpConfig) -> int:
    """Run until Ctrl-C or SIGTERM (exit code 0), or until a service ends by itself (1).

    Raises StartupError when something cannot start.
    """
    if config.prefill < 1 or config.decode < 1:
        raise StartupError("--prefill and --decode must be 1 or more")
    try:
        return run(_up(config, Console(stderr=True)))
    except BaseExceptionGroup as error:
        raise root_cause(error) from error


async def _up(config: UpConfig, console: Console) -> int:
    def on_line(name: str, line: str) -> None:
        console.print(log_line(name, line), soft_wrap=True)

    stop = termination_event()
    console.print(f"Starting {config.prefill} prefill and {config.decode} decode workers with {config.model} …")
    async with deployed(config, on_line) as deployment:
        console.print(overview(deployment))
        console.print(f'Ready. Ask:  kvbaton generate --router {deployment.address} "…"      Stop: Ctrl-C')
        return await _until_end(deployment, stop, console)


async def _until_end(deployment: Deployment, stop: asyncio.Event, console: Console) -> int:
    code = 0
    async with asyncio.TaskGroup() as group:
        stopping = group.create_task(stop.wait())
        exiting = group.create_task(deployment.first_exit())
        await asyncio.wait({stopping, exiting}, return_when=asyncio.FIRST_COMPLETED)
        if exiting.done():
            ended = exiting.result()
            console.print(f"[bold red]{ended.name} ended by itself (exit code {ended.process.returncode})[/]")
            code = 1
        stopping.cancel()
        exiting.cancel()
    console.print("Stopping …")
    return code


def log_line(name: str, line: str) -> Text:
    """A service's log line with its name in front."""
    colour = _COLOURS.get(name.partition("-")[0], "white")
    return Text.assemble((f"{name:<10}", colour), " ", line)


def overview(deployment: Deployment) -> Table:
    """What runs where."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("service", "address", "process"):
        table.add_column(column, header_style="bold")
    for process in deployment.processes:
        table.add_row(process.name, process.address, str(process.pid))
    return table
