"""Running the arms of a sweep: each once, those of another sweep on the same folder left to it, failures told."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from lightning_prune.callbacks.training_cost import COST_NAME
from lightning_prune.errors import PruneError
from lightning_prune.record import ARM_NAME
from lightning_prune.record import Arm as Result
from lightning_prune.sweep.facts import NetworkFacts
from lightning_prune.sweep.planning import Arm, Stage
from lightning_prune.sweep.processes import run_program
from lightning_prune.sweep.results import WITHIN, line, result_of
from lightning_prune.sweep.running import BusyError, Runner, held, is_done, run_stage, stopping

_LOOK_AGAIN = 2.0  # seconds between two looks at whether another sweep has finished an arm


@dataclass
class Driver:
    """Runs arms one after the other.

    Args:
        arms: In order.
        output: The sweep's folder.
        facts: Of each network.
        keep_going: Whether the others are run when one fails.
        runner: Runs one command line.

    Attributes:
        failures: By arm, what went wrong.
    """

    arms: Sequence[Arm]
    output: Path
    facts: Mapping[str, NetworkFacts]
    keep_going: bool = False
    runner: Runner = run_program
    failures: dict[str, str] = field(default_factory=dict)
    _seconds: float = 0.0  # spent here, and the multiply-adds that they bought
    _macs: float = 0.0

    def run(self) -> None:
        """Run what is missing; arms that another sweep holds are looked at again when the rest is done."""
        left = list(enumerate(self.arms, 1))
        with stopping():
            while left:
                busy: list[tuple[int, Arm]] = []
                for number, arm in left:
                    elsewhere = [other.folder for _, other in busy]
                    if _waits_for(arm, elsewhere) or not self._visit(number, arm):
                        busy.append((number, arm))
                    if self.failures and not self.keep_going:
                        return
                if len(busy) == len(left):
                    time.sleep(_LOOK_AGAIN)
                elif busy:
                    print(f"waiting for {len(busy)} arms that another sweep holds", flush=True)
                left = busy

    def is_finished(self, arm: Arm) -> bool:
        """Whether an arm's result is there, from these very commands.

        Raises:
            ConfigError: One of its folders holds another run.
        """
        done = [is_done(stage, self.output) for stage in arm.stages]  # each is compared with its command
        return all(done) and (arm.folder / ARM_NAME).exists()

    def _visit(self, number: int, arm: Arm) -> bool:
        """Run what an arm lacks; whether it is settled, by its end or by a failure."""
        where = f"[{number}/{len(self.arms)}] {arm.label}"
        try:
            if self.is_finished(arm):
                result, rest = Result.read(arm.folder), " (done before)"
            else:
                for stage in arm.stages:
                    with held(stage.folder):
                        self._run(stage)
                with held(arm.folder):
                    result = result_of(arm, self.facts[arm.network.name], self.output)
                    result.write(arm.folder)
                rest = self._rest(number)
        except BusyError:
            return False
        except (PruneError, OSError) as error:
            self.failures[arm.label] = f"{type(error).__name__}: {error}"
            print(f"{where}: failed, {self.failures[arm.label]}", flush=True)
            return True
        deviation = result.cost.deviation
        if deviation is not None and abs(deviation) > WITHIN:
            self.failures[arm.label] = f"its cost is {100 * (1 + deviation):.1f} % of what it may spend"
        print(f"{where}: {line(result)}{rest}", flush=True)
        return True

    def _run(self, stage: Stage) -> None:
        if is_done(stage, self.output):
            return
        begin = time.monotonic()
        run_stage(stage, self.output, self.runner)
        self._seconds += time.monotonic() - begin
        self._macs += stage.macs

    def _rest(self, number: int) -> str:
        """About how long the arms after this one take, at the speed of those before."""
        seen = {stage.folder for arm in self.arms[:number] for stage in arm.stages}
        later = {stage.folder: stage for arm in self.arms[number:] for stage in arm.stages if stage.folder not in seen}
        macs = sum(stage.macs for stage in later.values() if not (stage.folder / COST_NAME).exists())
        if not macs or not self._macs:
            return ""
        return f"; about {timedelta(seconds=round(macs * self._seconds / self._macs))} left"


def _waits_for(arm: Arm, folders: Sequence[Path]) -> bool:
    """Whether an arm needs a file that is still to come from an arm in one of these folders."""
    missing = [path for stage in arm.stages for path in stage.needs if not path.exists()]
    return any(path.is_relative_to(folder) for path in missing for folder in folders)
