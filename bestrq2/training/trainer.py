"""The pretraining loop, on one process or many."""

import logging
from collections.abc import Generator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from bestrq2.config import Config
from bestrq2.data import Batch, DataError, batches
from bestrq2.data.fingerprint import data_identity
from bestrq2.errors import CheckpointError, TrainingError, counted
from bestrq2.hardware import (
    choose_device,
    choose_precision,
    is_out_of_memory,
    keep_freed_memory,
    out_of_memory,
    peak_flops,
)
from bestrq2.hashing import mix
from bestrq2.models import BestRQ, BestRQ2
from bestrq2.models.best_rq2 import PretrainOutput
from bestrq2.models.frozen import FrozenHead
from bestrq2.runs.bad_batches import save_bad_batch
from bestrq2.runs.checkpoint import Checkpoint
from bestrq2.runs.folder import RunFolder
from bestrq2.runs.report import save_report

from .compilation import compile_blocks, compiles
from .describe import about_model, describe_run, is_finite
from .distributed import Ranks, only_accumulate, shared
from .evaluation import Evaluation
from .feeder import Feeder, Preparation, preparation
from .first_look import describe_targets, first_look
from .health import HealthCheck
from .interrupt import StopSignal
from .late import Reading, measures
from .optimizer import accept_bf16_gradients, clip_gradients, set_schedule, step_if_finite
from .saver import Saver
from .state import TrainingState
from .step import StepTotals, check_batch, check_targets, micro_batches
from .training_log import TrainingLog

logger = logging.getLogger(__name__)

_REMEDY = "Lower optimizer.learning_rate, set optimizer.max_grad_norm=1, or use train.precision=fp32"


class Trainer:
    """Trains ``model`` on ``dataset`` into the folder ``run``, from ``checkpoint`` on if there is one.

    The data set is a ``CropDataset``, or the ``EmbeddingDataset`` of a head on a frozen encoder. ``measured`` is the
    configuration of what is measured beside training, where it is not ``config``.

    A step of all ranks together is the same for any number of them and any ``train.accumulate``: the audio of a step,
    its masks and the weight of every target depend on the step alone (sums are rounded in another order; dropout draws
    differ between ranks).
    """

    def __init__(
        self,
        config: Config,
        model: BestRQ2 | BestRQ | FrozenHead,
        dataset: Any,
        run: RunFolder,
        ranks: Ranks,
        checkpoint: Checkpoint | None = None,
        measured: Config | None = None,
    ) -> None:
        settings, measured = config.train, measured or config
        self.config, self.settings, self.dataset, self.run, self.ranks = config, settings, dataset, run, ranks
        check_batch(config, dataset, ranks.size)
        self.device = ranks.all_agree(lambda: choose_device(settings.device, ranks.local_rank))
        self.autocast = choose_precision(settings.precision, self.device)
        self.resumed = checkpoint is not None
        self.state = TrainingState(config, model, ranks, self.device, self.autocast, checkpoint)
        self.model = self.state.model
        if compiles(settings.compile, self.device):
            compile_blocks(self.model)
        if self.device.type == "cpu":
            keep_freed_memory()
            accept_bf16_gradients(self.model, config, self.autocast, ranks.size)
        self.identity = ranks.from_first(self._identity)
        self.first_step = self.state.progress.step
        self.postponed = False  # a save that was due while steps were not finite
        self.late: Reading | None = None
        self.rate = self.grad_norm = 0.0  # of the last step
        # What cannot be used is refused before anything is written.
        if not isinstance(self.model, FrozenHead):
            check_targets(self.model, dataset)
        self.evaluation = Evaluation(measured, self.model, ranks, self.device, self.autocast, dataset, run.path)
        if checkpoint is None:
            ranks.from_first(self.evaluation.check_probe)
        self.peak = peak_flops(self.device, self.autocast)
        health = HealthCheck(measured, self.model, dataset, ranks, self.device)
        self.log = TrainingLog(config, run, self.state, health, ranks, self.device, self.peak[0])
        self.saver = Saver(run, config, self.first_step, ranks.is_first, self.evaluation.held_out)
        if checkpoint is not None and self.saver.changed_since(checkpoint):
            self.state.progress.take_score()  # of losses that mean something else

    def train(self) -> int:
        """Returns the exit code: 0, or 128 + signal number after a requested stop.

        Raises:
            TrainingError: if it cannot go on; the message says what to change.
            CheckpointError: if the last checkpoint could not be written.
            DataError: if too many files cannot be read, on any rank; what was trained is saved before.
        """
        settings, progress = self.settings, self.state.progress
        describe_run(self.config, self._about(), self.run, self.ranks, self.device, self.autocast, self.peak)
        # A run that was killed before its first checkpoint begins again, and so does its log.
        self.log.open(progress.step if self.resumed else -1)
        if not self.resumed:
            self._first_look()
        self.saver.begin()
        self.log.begin()
        if progress.evaluated_step != progress.step:
            self._evaluate()  # before the first step, or left out when the run was asked to stop
        stream = self._stream(progress.step, settings.steps - progress.step)
        stopping = False
        feeder = Feeder(stream, self.device, self._preparation(), progress.step)
        with closing(self.saver), self.log.showing(progress.step), StopSignal() as stop, closing(feeder):
            feeder.prefetch()
            self._agree_on_data(self.ranks.sum([feeder.error is not None])[0] > 0, feeder)
            for fed in feeder:
                totals = self._step(fed.batch, feeder, fed.waited, stop.requested)
                stopping = totals.stops > 0
                if stopping and self.ranks.is_first:
                    logger.info(f"{stop.name}: the step is finished; saving (again to leave at once)")
                self._after(totals, stopping)
                if stopping:
                    break
                self._agree_on_data(totals.failures > 0, feeder)
        self.log.close()
        # The others wait: torchrun ends all processes as soon as one of them has stopped.
        return self.ranks.from_first(lambda: self._finish(stop if stopping else None))

    def _preparation(self) -> Preparation | None:
        whole = self.ranks.size == 1 and self.settings.accumulate == 1
        return preparation(self.model, self.device, self.autocast) if self.device.type == "cuda" and whole else None

    def _stream(self, start_step: int, num_steps: int) -> Generator[Batch, None, None]:
        """The batches of this rank, on the CPU."""
        return batches(
            self.dataset,
            self.settings.batch_size,
            start_step=start_step,
            num_steps=num_steps,
            workers=self.config.data.workers,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            pin_memory=self.device.type == "cuda",
            as_float=False,  # the feeder converts on the device
        )

    def _about(self) -> str:
        return about_model(self.config, self.model)

    def _identity(self) -> dict[str, Any]:
        """Data identity in a checkpoint, so that a run continues with the same data."""
        return data_identity(self.dataset)

    def _agree_on_data(self, failed: bool, feeder: Feeder) -> None:
        """Stop every rank, with the same message, where one of them cannot have its next batch."""
        if not failed:
            return
        if feeder.error is not None and not isinstance(feeder.error, DataError):
            raise feeder.error
        messages = self.ranks.texts("" if feeder.error is None else str(feeder.error))
        raise shared(DataError(next(filter(None, messages), "the data of another rank failed")))

    def _step(self, batch: Batch, feeder: Feeder, waited: float, stop: bool) -> StepTotals:
        """One update. Returns what the step was, summed over all ranks."""
        state, step = self.state, self.state.progress.step
        self.rate = set_schedule(state.optimizer, step, self.settings.steps, self.config.optimizer)
        parts = micro_batches(batch, self.settings.accumulate)
        counts = [self.model.num_predicted(part.lengths, step) for part in parts]
        total_count = sum(counts)
        if self.ranks.size > 1:
            total_count = int(self.ranks.sum([total_count])[0])
        totals = StepTotals.of(
            batch, self.dataset.sampling_rate, waited, stop, self.ranks.is_first and self.saver.overdue()
        )
        losses: list[Tensor] = []
        found: list[tuple[Tensor, Tensor | None]] = []
        try:
            for number, (part, count) in enumerate(zip(parts, counts)):
                output = self._forward_backward(
                    part, step, number, count / max(1, total_count), number == len(parts) - 1
                )
                losses.append(measures(output, touching=self._is_logged(step + 1)) * count)
                found.append((output.codes, output.plan.predicted_valid()))
                totals.add_plan(output.plan, self.model.flops(output.plan))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            longest = int(batch.lengths.max()) / self.dataset.sampling_rate
            state.optimizer.zero_grad(set_to_none=True)
            self._read_late()
            if self.ranks.size == 1 and step > self.saver.saved_step:  # several ranks could not agree on it now
                self._save(wait=True)
            raise out_of_memory(error, self.model, self.device, len(parts[0]), longest) from error
        for number, (codes, valid) in enumerate(found):  # only now: a step that fails must leave the state as it was
            state.usage.update(codes, valid, decay=number == 0)
        norm = clip_gradients(self.model, self.config.optimizer.max_grad_norm, state.scale.value, state.optimizer)
        values = torch.cat((torch.stack(losses).sum(0), norm[None]))
        if queued := self._queues():  # handed over before anybody has seen whether loss and norm are finite
            step_if_finite(state.optimizer, torch.stack((values[0], values[-1])))
        feeder.prefetch()
        totals.failures, totals.targets = float(feeder.error is not None), sum(counts)
        self._read_late()  # the step before, which the device may have ended by now
        if self._may_wait(reading := Reading(step + 1, batch, totals, values, queued)):
            reading.start()
            self.late = reading
        else:
            totals = self._read(reading)
        state.optimizer.zero_grad(set_to_none=True)
        self._count(batch, totals)
        return totals

    def _queues(self) -> bool:
        """Return True if updates are handed to the device without a look at loss and norm."""
        return self.device.type == "cuda" and self.ranks.size == 1

    def _may_wait(self, reading: Reading) -> bool:
        """Return True if nothing depends on the values of a step before the next one has been queued."""
        number, totals, state = reading.number, reading.totals, self.state
        steady = state.average is None and not state.scale.enabled and state.progress.bad_in_a_row == 0
        due = self._is_logged(number) or number % self.settings.save_every == 0 or self.evaluation.due(number, False)
        return reading.queued and steady and not (due or totals.stops or totals.overdue or totals.failures)

    def _read_late(self) -> None:
        """Read the values of the step before, if they were left on the device."""
        if self.late is not None:
            found, self.late = self._read(self.late), None
            sums = StepTotals(found.loss, found.accuracy, clip_loss=found.clip_loss, touching=found.touching)
            self.log.add(sums)

    def _read(self, reading: Reading) -> StepTotals:
        """Wait for a step and act on its values. Returns its totals over all ranks."""
        totals = reading.totals
        *sums, self.grad_norm = reading.read()
        totals.loss, totals.accuracy, totals.clip_loss, totals.touching = sums
        own_loss, totals = totals.loss, totals.summed(self.ranks)
        self._update(reading, totals, own_loss)
        return totals

    def _is_logged(self, number: int) -> bool:
        return number % self.settings.log_every == 0 or number == self.settings.steps

    def _forward_backward(self, part: Batch, step: int, number: int, weight: float, last: bool) -> PretrainOutput:
        # Dropout and stochastic depth: a pure function of (seed, step, place), so that a resumed run repeats them.
        place = self.ranks.rank * self.settings.accumulate + number
        torch.manual_seed(mix(self.settings.seed, 2, step, *([place] if place else [])) >> 1)
        with only_accumulate(self.state.parallel, last):
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                ahead = {} if part.prepared is None else {"prepared": part.prepared}
                output = self.state.parallel(*part.inputs, step=step, index=part.index, **ahead)
            # Ranks are averaged, micro-batches are added: so every target of the step weighs the same.
            factor = weight * self.ranks.size * self.state.scale.value
            objective = output.objective
            (objective if factor == 1.0 else objective * factor).backward()
        return output

    def _update(self, reading: Reading, totals: StepTotals, own_loss: float) -> None:
        state, number = self.state, reading.number
        finite = is_finite(totals.loss) and is_finite(self.grad_norm)
        explained = state.scale.update(finite)
        if finite:
            if not reading.queued:
                state.optimizer.step()
            if state.average is not None:
                state.average.update()
            state.progress.bad_in_a_row = 0
            state.progress.unscored_steps += 1
            state.progress.unscored_loss += totals.loss
            state.progress.unscored_targets += totals.targets
            return
        state.progress.skipped_steps += 1
        if explained:
            self._warn(f"step {number}: fp16 overflow, update skipped, loss scale now {state.scale.value:g}")
            return
        state.progress.bad_in_a_row += 1
        own = [is_finite(value) for value in self.ranks.gathered(own_loss)]
        if not own[self.ranks.rank] or all(own):  # the rank whose loss it was, or an unknown rank
            path = save_bad_batch(self.run.path, number, self.ranks.rank, reading.batch, own_loss, self.grad_norm)
            if path is not None:
                logger.info(f"note: the batch is kept in {path} (bestrq2 report --bad-batch {path})")
        self._warn(f"step {number}: loss {totals.mean_loss}, gradient norm {self.grad_norm}: update skipped")

    def _count(self, batch: Batch, totals: StepTotals) -> None:
        progress = self.state.progress
        progress.step += 1
        progress.audio_seconds += totals.audio_seconds
        progress.skipped_files += round(totals.skipped_files)
        self.run.report_skips(batch.skips, self.ranks.rank)
        self.state.skips.update(skip.reason for skip in batch.skips)

    def _after(self, totals: StepTotals, stopping: bool) -> None:
        """Log, evaluate and save where it is time to; all ranks agree on it."""
        progress, settings = self.state.progress, self.settings
        done, last = progress.step, progress.step == settings.steps
        self.log.add(totals)
        self.log.advance()
        if self._is_logged(done):
            self.log.write_step(totals, self.rate, self.grad_norm)
        if not stopping:
            self._evaluate()
        failing = totals.failures > 0
        ends, bad = last or stopping or failing, progress.bad_in_a_row
        due = self.postponed or done % settings.save_every == 0 or totals.overdue > 0
        # Such steps change no weight, and what they would change may be ruined: they push out no checkpoint.
        self.postponed = due and bad > 0 and not ends
        if ends or (due and not bad):
            # Few steps tell little: what an interruption leaves, or the last steps, would be the best by chance.
            enough = totals.overdue > 0 or 2 * progress.unscored_steps >= settings.save_every
            self._save(wait=ends, scored=(due and enough) or (last and (enough or not self.saver.scored)))
        if bad >= settings.max_bad_steps:
            problem = TrainingError(
                f"{bad} steps in a row were not finite. {_REMEDY}. Checkpoints are in {self.run.checkpoints}."
            )
            raise shared(problem)

    def _evaluate(self) -> None:
        progress = self.state.progress
        last = progress.step == self.settings.steps
        if not self.evaluation.due(progress.step, last):
            return
        with self.log.paused():
            results = self.evaluation.run(progress.step, last, self.log.rows)
            progress.evaluated_step = progress.step
            if self.evaluation.validation_loss is not None:
                progress.validation_loss = self.evaluation.validation_loss
            repeated = progress.step == self.first_step and self.log.has(progress.step, results)
            if results and not repeated:
                self.log.write({"step": progress.step, **results})

    def _save(self, wait: bool, scored: bool = False) -> None:
        """Write a checkpoint (a collective call). The log is on the disk before: a kill leaves no hole in it.

        Args:
            wait: until it is written.
            scored: with the mean training loss since the last one with it, where no audio is held out.

        Raises:
            TrainingError: weights are not finite. Such checkpoints would push out those that can be used.
        """
        self.log.flush()
        value = self.state.progress.take_score() if scored else None
        if self.evaluation.validates:
            value = self.evaluation.loss_at(self.state.progress.step)
        snapshot = self.state.snapshot(**self.identity)
        broken = self.ranks.texts("" if snapshot is None else ", ".join(snapshot.not_finite()))[0]
        if broken:
            shown = broken if len(broken) < 100 else f"{broken[:100]} ..."
            raise shared(
                TrainingError(
                    f"step {self.state.progress.step}: weights are not finite any more ({shown}): no checkpoint is "
                    f"written. {_REMEDY}, and continue from an earlier one: {self.run.resume_command()}"
                )
            )
        if snapshot is not None:
            self.saver.save(snapshot, value, wait)

    def _first_look(self) -> None:
        """Code usage of the targets and health of the encoder before any training."""
        health = self.log.health.measure(0)
        if not self.ranks.is_first:
            return
        look = first_look(self.model, self.dataset, self.config, self.device)
        found = look.metrics()
        describe_targets(look, self.model)
        self.log.write({"step": 0, **found, "learning_rate": 0.0, **health})

    def _finish(self, stop: StopSignal | None) -> int:
        done = self.state.progress.step
        report = save_report(self.run.path, f"{self.config.recipe}, {done} steps")
        if self.saver.problem is not None:
            raise CheckpointError(  # what was wrong has been said when it happened
                f"the checkpoint of step {done} could not be written, see above; once there is room, continue with: "
                f"{self.run.resume_command()}"
            ) from self.saver.problem
        if stop is not None:
            logger.info(f"Stopped by {stop.name} after step {done}; continue with: {self.run.resume_command()}")
            return stop.exit_code
        if bad := self.state.progress.bad_in_a_row:
            self._warn(
                f"the last {counted(bad, 'step')} were not finite and changed nothing: the weights are those of step "
                f"{done - bad}, and may be ruined. {_REMEDY}"
            )
        self.run.summarise(report, self.config.frozen.source or self.run.path)
        return 0

    def _warn(self, message: str) -> None:
        if self.ranks.is_first:
            logger.warning("%s", message)
