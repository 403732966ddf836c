"""The `repertory` command."""

import os
import re
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

from actors import serve_commands
from rl.config_file import ConfigError

app = typer.Typer(
    help="Train language-model agents over many turns of interaction, and put them to work.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)
console = Console()

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key.sub=value]...", help="Settings to change; list items by index: stages.1.steps=3"),
]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML configuration, for example configs/quickstart.yaml")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    job: Annotated[
        bool,
        typer.Option(
            "--job",
            help="For schedulers that try a job again: go on from the newest checkpoint, or start over where nothing "
            "was saved; exit with 75 when stopped before the end.",
        ),
    ] = False,
) -> None:
    """Train an agent: every stage of CONFIG, with each role in its own process.

    Example:  repertory train configs/quickstart.yaml run.name=mine run.seed=1 stages.3.steps=20

    Attaches to the Ray cluster at RAY_ADDRESS, or starts one of its own. The run's folder holds everything it made;
    look at it with `repertory view`.
    """
    from actors.launch import run_training
    from rl.config_file import load_config, placing_errors

    with placing_errors(config, overrides or []):
        run_training(load_config(config, overrides or []), console, resume=resume, job=job)


@app.command("eval")
def evaluate(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT|RUN|CONFIG... [key.sub=value]...",
            help="Checkpoint or run folders, or a YAML, whose initial model it is then. Several are evaluated on the "
            "first one's tasks. Settings change all of them: the evaluation is stages.0",
        ),
    ],
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Also evaluate models that OpenAI's chat completions serve at, for example, http://localhost:8000/v1. "
            "A YAML then only says what is played. Needs no GPU, Ray or vLLM here.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A model at the endpoint; give it again for another one.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="VAR", help="The environment variable with its key, which is written nowhere.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Episodes at a time at the endpoint.")] = 16,
    feedback: Annotated[
        bool, typer.Option("--feedback", help="Twice each: with env.feedback as it is set, and with none. Shows Δ.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep what the same command has finished before: whole evaluations, and a part's episodes.",
        ),
    ] = False,
) -> None:
    """Evaluate checkpoints, runs and served models on held-out tasks, sampled and greedy, side by side.

    Example:  repertory eval runs/quickstart/checkpoints/latest stages.0.n=100 env.max_digits=5

              repertory eval runs/seed-0 runs/seed-1 stages.0.samples=8

              repertory eval configs/quickstart.yaml --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-4B

    Each leaves a run folder with report.json, eval.jsonl and every episode, for `repertory view` and `compare`.
    What could not be played or graded counts as neither success nor failure, and is told.
    """
    from actors.eval_command import Asked, run_evaluations
    from rl.config_file import placing_errors

    named, overrides = [], []
    for one in what:
        is_setting = re.match(r"[\w.]+=", one) and not Path(one).exists()
        overrides.append(one) if is_setting else named.append(Path(one))
    if not named:
        raise ConfigError("name a checkpoint, a run or a configuration to evaluate, before the settings")
    asked = Asked(named, overrides, endpoint, model or [], api_key_env, parallel, feedback, resume)
    with placing_errors(named[0], overrides):
        run_evaluations(asked, console)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="Also say what this machine lacks for this configuration")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check this machine, and what it lacks for a configuration. Exits with 1 when something is missing.

    Example:  repertory doctor configs/cluster/qwen_8gpu.yaml
    """
    from actors.doctor import diagnose
    from rl.config_file import load_config

    loaded = load_config(config, overrides or []) if config else None
    raise typer.Exit(0 if diagnose(loaded, console) else 1)


@app.command()
def view(
    run: Annotated[Path, typer.Argument(help="A run folder, for example runs/quickstart")],
    episodes: Annotated[int, typer.Option(help="How many episodes to show.")] = 3,
    success: Annotated[
        bool | None, typer.Option("--success/--failure", help="Only episodes that did, or did not.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Only episodes of this step of their stage.")] = None,
    flag: Annotated[
        str | None, typer.Option(help="Only episodes with a turn so flagged (tool_error, truncated).")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show every token with mask, log-prob and version.")] = False,
) -> None:
    """Show a run: its evaluations, its curve, and its episodes turn by turn.

    Example:  repertory view runs/quickstart --failure --step 3 --tokens
    """
    from actors.view import show_run

    show_run(run, console, episodes=episodes, success=success, step=step, flag=flag, tokens=tokens)


@app.command()
def status(run: Annotated[Path, typer.Argument(help="A run folder, for example runs/quickstart")]) -> None:
    """Say how a run stands, from any terminal that sees its folder.

    Example:  repertory status runs/quickstart
    """
    from actors.run_folder import show_status

    show_status(run, console)


@app.command()
def stop(
    run: Annotated[Path, typer.Argument(help="A run folder, for example runs/quickstart")],
    wait: Annotated[bool, typer.Option(help="Return when the run has ended.")] = True,
) -> None:
    """Have a run finish its step, save, and end; `train --resume` goes on. SIGTERM to `train` does the same.

    Example:  repertory stop runs/quickstart
    """
    from actors.run_folder import stop_run

    stop_run(run, console, wait=wait)


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(help="A run folder, for example runs/quickstart")],
    wanted: Annotated[list[str], typer.Argument(metavar="ROLE=N", help="generator, rollout, reward or reference")],
    wait: Annotated[bool, typer.Option(help="Return when the actors are there, or gone.")] = True,
) -> None:
    """Add actors to a run that goes on, or take some away. Nothing that is under way is lost.

    Example:  repertory scale runs/quickstart generator=3 rollout=2

    A generator that joins takes the newest weights from the store first. A resumed run has the numbers of its
    configuration again.
    """
    from actors.run_folder import scale_run

    numbers: dict[str, int] = {}
    for one in wanted:
        role, _, count = one.partition("=")
        if role not in ("generator", "rollout", "reward", "reference") or not count.isdigit() or int(count) < 1:
            raise ConfigError(f"{one!r}: give ROLE=N with N at least 1, of generator, rollout, reward or reference")
        numbers[role] = int(count)
    scale_run(run, numbers, console, wait=wait)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, those of `repertory eval` too")],
    all_stages: Annotated[bool, typer.Option("--all", help="Every evaluation of a run, not its last alone.")] = False,
) -> None:
    """Set evaluations side by side: success, and each one's difference to the first, task by task, with 95 % intervals.

    Example:  repertory compare runs/quickstart --all
              repertory compare runs/smollm2-eval-1 runs/smollm2-eval-2
    """
    from actors.compare import show_comparison

    show_comparison(runs, console, all_stages)


@app.command()
def audit(run: Annotated[Path, typer.Argument(help="A run folder, for example runs/quickstart")]) -> None:
    """Prove from a run's folder that its rl stages consumed every task that they drew exactly once.

    Reads what became of each group (consumed.jsonl), what is under way in the newest checkpoint, and the episodes that
    were trained on (trajectories/). Exits with 1 when something was lost or counted twice.

    Example:  repertory audit runs/quickstart
    """
    from actors.audit import show_audit

    raise typer.Exit(0 if show_audit(run, console) else 1)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make; it must not exist, or be empty")],
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT",
            help="Checkpoints of one architecture: checkpoint folders, run folders (their newest one), or any model in "
            "Hugging Face format. The first gives tokenizer, chat template, configuration and dtype",
        ),
    ],
    method: Annotated[
        Literal["uniform", "greedy", "lines"],
        typer.Option(
            help="uniform: the mean of the weights. greedy: from the best alone downwards, each joins the mean if "
            "held-out success strictly rises. lines: changes from --base, scaled up with depth."
        ),
    ] = "uniform",
    base: Annotated[
        str | None, typer.Option(help="lines: the model that was trained from, as a CHECKPOINT or as model.path.")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="lines: the first block's factor. Default: 1 over the number of checkpoints; one needs it."),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            help="lines: what is added to the factor up to the last block. Default: 1 - alpha, the change whole; with "
            "several, try 0.1 to 1 on held-out tasks."
        ),
    ] = None,
    eval_n: Annotated[
        int | None,
        typer.Option(min=1, help="greedy: held-out tasks a score. Default: what the first one's eval stage has."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of the merged weights. Default: as the first has.")
    ] = None,
) -> None:
    """Merge checkpoints of one architecture into one: the mean of several seeds, or SFT's and RL's best of both.

    Example:  repertory merge runs/soup runs/seed-0 runs/seed-1 runs/seed-2 --method greedy --eval-n 200

    uniform and greedy are model soups (arXiv 2203.05482), lines is LiNeS (arXiv 2410.17146). Means are taken in
    float32, a tensor at a time. A greedy soup of N takes 2 N - 1 evaluations on the first one's held-out tasks, each
    with a run folder and a Ray of its own, like `repertory eval`.
    """
    from actors.merge import Merge
    from actors.merge import merge as merge_checkpoints

    merge_checkpoints(Merge(out, checkpoints, method, base, alpha, beta, eval_n, dtype), console)


serve_commands.add_to(app)


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2, never a traceback."""
    from rich.markup import escape

    failed: Any = None
    try:
        app()
    except ConfigError as error:
        failed = error
    except KeyboardInterrupt:
        console.print("stopped")
        raise SystemExit(130) from None
    if failed is not None:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(failed))}", highlight=False)
        raise SystemExit(2)


def entry() -> NoReturn:
    """The console script: `main`, and out. The interpreter's own end is skipped.

    Ray's, Arrow's and torch's native threads are torn down there in no order: now and then the process aborted after
    all was done, and a finished run's exit code was 134.
    """
    code = 1
    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
