"""`kvbaton up`: a deployment in the foreground."""

import asyncio

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvbaton.cli.deployment import Deployment, UpConfig, deployed
from kvbaton.rpc.errors import root_cause
from kvbaton.rpc.serving import run, termination_event

_COLOURS = {"prefill": "cyan", "decode": "green", "worker": "blue", "router": "magenta"}


def run_up(config: UpConfig) -> int:
    """Run until Ctrl-C or SIGTERM (exit code 0), or until a service ends by itself (1).

    Raises StartupError when something cannot start.
    """
    try:
        return run(_up(config, Console(stderr=True)))
    except BaseExceptionGroup as error:
        raise root_cause(error) from error


async def _up(config: UpConfig, console: Console) -> int:
    stop = termination_event()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(_run(config, console))
        stopping = group.create_task(stop.wait())
        # Loading takes long: Ctrl-C must end that too.
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            console.print("Stopping …")
            running.cancel()
        stopping.cancel()
    return 0 if running.cancelled() else running.result()


async def _run(config: UpConfig, console: Console) -> int:
    def on_line(name: str, line: str) -> None:
        console.print(log_line(name, line), soft_wrap=True)

    console.print(f"Starting {_kinds(config)} with {config.model} …")
    async with deployed(config, on_line) as deployment:
        console.print(overview(deployment))
        ask = f'kvbaton generate --router {deployment.address} "…"'
        console.print(f"Ready. Ask:  {ask}      Stop: Ctrl-C", soft_wrap=True)
        ended = await deployment.first_exit()
        console.print(f"[bold red]{ended.name} ended by itself (exit code {ended.process.returncode})[/]")
    return 1


def _kinds(config: UpConfig) -> str:
    numbers = {"prefill": config.prefill, "decode": config.decode, "unified": config.unified}
    return " and ".join(f"{number} {kind}" for kind, number in numbers.items() if number) + " workers"


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
