"""The training loop: state in, state out; order, augmentation, dropout and learning rate follow from the step.

All processes of a run execute the same steps, evaluations and checkpoints, and agree on a request to stop at each step
boundary. BatchNorm normalizes the images of each process by itself, so only batch-independent norms give the same
curve on one process and on several.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sized
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from experiments import checkpoint, sharding
from experiments.budget import Budget
from experiments.feed import Feed
from experiments.memory import is_out_of_memory
from experiments.meter import NonFiniteLoss, peak_mib
from experiments.micro_batch import MicroBatch, all_fit
from experiments.progress import Report
from experiments.randomness import fold, seed_device
from experiments.run import Run
from experiments.run_folder import RunFolder
from experiments.schedule import learning_rate
from experiments.signals import StopRequest, TrainingStopped, agree
from experiments.state import State
from experiments.tasks import Classification

SAVE_SECONDS = 5.0  # without checkpoint_every, no two checkpoints are closer
POLL_STEPS = 16  # on several GPUs: agreeing makes the host wait, so not at every step


class Loop:
    """Trains `net` for `run` from the checkpoint in `folder`, if there is one, to the end.

    Args:
        run: what to do.
        accelerator: of this process.
        task: the batches, the loss, and what is measured.
        net: the model on the CPU, initialized alike on all processes.
        train, test: the images, on the device unless their batches are put there.
        folder: where results go; already opened for this run.
        report: what tells the user.
        stop: the signals received.
    """

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        task: Classification,
        net: nn.Module,
        train: Sized,
        test: Sized,
        folder: RunFolder,
        report: Report,
        stop: StopRequest,
    ):
        self.run, self.accelerator, self.device = run, accelerator, accelerator.device
        self.folder, self.report, self.stop, self.task, self.test = folder, report, stop, task, test
        self.feed = self._feed(train)
        self.total = run.steps or run.epochs * self.feed.steps_per_epoch
        self.micro_batch = MicroBatch(folder.path, self._images_at_once())
        self.eval_steps = max(1, round(run.eval_every * self.feed.steps_per_epoch))
        layout = torch.channels_last if run.channels_last else torch.preserve_format
        net = net.to(self.device, memory_format=layout)
        self.synchronized = any(isinstance(module, nn.SyncBatchNorm) for module in net.modules())
        self.sharded = sharding.asked(accelerator.num_processes)
        if self.sharded:
            sharding.check(run)
        shares = accelerator.num_processes if self.sharded else 1
        self.state = State(run, net, self.total, accelerator.scaler, self._budget(), shares)
        self._resume()
        self.last_step = self._last_step()
        self.model = self._wrap(net)
        self._saved_at = self._logged_at = self.state.step
        self._mark = self._logged_time = self._saved_time = time.perf_counter()

    # What private training does in another way

    def _feed(self, train: Sized) -> Feed:
        return self.task.feed(train)

    def _images_at_once(self) -> int:
        return math.ceil(self.run.batch_size / self.accelerator.num_processes / self.run.accumulate)

    def _budget(self) -> Budget | None:
        return None

    def _last_step(self) -> int:
        return self.total

    def _wrap(self, net: nn.Module) -> nn.Module:
        return net if self.sharded else self.accelerator.prepare(torch.compile(net) if self.run.compile else net)

    def _seed(self, step: int) -> None:
        seed_device(self.device, fold(self.run.seed, "step", step, self.accelerator.process_index))

    def _update(self, step: int) -> Tensor:
        """Move the weights by the gradients of a step; returns this process's loss."""
        loss = self._backward(*self.feed.batch(step))
        self._apply_gradients()
        return loss

    def _row_extras(self) -> dict[str, float]:
        """Further columns of the log."""
        return {}

    def record(self) -> dict[str, Any]:
        """Further content of `run.json`."""
        return self.micro_batch.record()

    def close(self) -> None:
        """After the result has been written."""

    # The run

    def finish(self) -> None:
        """Train to the last step.

        Raises `TrainingStopped` after saving, `NonFiniteLoss` and `OutOfMemory` without saving.
        """
        state = self.state
        self.report.start(state.step, self.total)
        state.net.train()
        self._try_first_step()
        while True:
            if state.step > state.evaluated and (state.step % self.eval_steps == 0 or state.step == self.last_step):
                self._evaluate()
            if state.step == self.last_step:
                break
            self._train_step()
            self._save_or_stop()
        self._save()

    # One step

    def _train_step(self) -> None:
        state = self.state
        self._seed(state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = self._learning_rate(state.step)
        try:
            loss = self._update(state.step)
        except RuntimeError as error:
            if is_out_of_memory(error):
                self.micro_batch.give_up(state.step, state.net, self.accelerator)
            raise
        state.update_average()
        state.step += 1
        if state.meter.add(loss):
            self._flush()

    def _learning_rate(self, step: int) -> float:
        return learning_rate(self.run, step, self.feed.steps_per_epoch, self.total)

    def _backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Accumulate the gradient of the mean loss, and return the loss; processes exchange gradients once."""
        size, total = self.micro_batch.at(self.state.step), self.task.total(labels)
        if len(images) <= size:
            return self._backward_part(images, labels, total)
        pairs = list(zip(images.split(size), labels.split(size), strict=True))
        with self.accelerator.no_sync(self.model):
            losses = [self._backward_part(x, y, total) for x, y in pairs[:-1]]
        losses.append(self._backward_part(*pairs[-1], total))
        return torch.stack(losses).sum()

    def _backward_part(
        self, images: Tensor, labels: Tensor, total: Tensor | int, model: nn.Module | None = None
    ) -> Tensor:
        with self.accelerator.autocast():
            logits = (model or self.model)(images).float()
        loss = self.task.loss(logits, labels, total)
        self.accelerator.backward(loss)
        return loss.detach()

    def _try_first_step(self) -> None:
        """Before several processes wait for each other in a step, all learn whether it fits on each of them."""
        if self.accelerator.num_processes == 1 or self.synchronized or self.sharded:
            return
        state, size = self.state, self.micro_batch.at(self.state.step)
        images, labels = (part[:size] for part in self.feed.batch(state.step))
        total = self.task.total(labels)
        if not all_fit(lambda: self._backward_part(images, labels, total, state.net), state.net, self.accelerator):
            self.micro_batch.give_up(state.step, state.net, self.accelerator, together=True)

    def _apply_gradients(self) -> None:
        # The bare optimizer: accelerate's wrapper adds look-ups to every step, and only its scaler is needed.
        optimizer, scaler = self.state.optimizer, self.accelerator.scaler
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()

    def _flush(self) -> None:
        """Look at the losses so far: write them down, or stop at the first that is not finite."""
        try:
            rows = self.state.meter.flush(self.state.step, lambda losses: self.accelerator.reduce(losses, "mean"))
        except NonFiniteLoss as error:
            self._fail("training loss", error.loss, error.step)
        if self.accelerator.is_main_process:
            self.folder.append_losses(rows)
        self.report.advance(self.state.step)

    def _fail(self, what: str, loss: float, step: int) -> NoReturn:
        kept = f"the last good checkpoint is {self.folder.last}" if self.folder.last.exists() else "nothing was saved"
        rate, epoch = self._learning_rate(step), step / self.feed.steps_per_epoch
        raise NonFiniteLoss(
            step,
            loss,
            f"{self.folder.path}: the {what} is {loss} at step {step} (epoch {epoch:.2f}, learning rate {rate:.3g});"
            f" {kept}. Try a lower --lr, --warmup 100, or --mixed-precision no",
        )

    # Evaluation

    def _evaluate(self) -> None:
        self._flush()
        seconds = self._tick()
        self._share_buffers()
        seed_device(self.device, fold(self.run.seed, "evaluate", self.state.step))
        net = self.state.evaluated_net
        measured = self.task.evaluate(net, self.test, stopped=lambda: bool(self._stop_signal()))
        if measured is None:
            self._save_and_leave(self._stop_signal())
        if not measured["test_loss"] < float("inf"):  # NaN too
            self._fail("test loss", measured["test_loss"], self.state.step)
        self._record(measured, seconds, net)
        self._mark = self._logged_time = time.perf_counter()

    def _record(self, measured: dict[str, float], seconds: float, net: nn.Module) -> None:
        """Add the row of this evaluation to the log, and keep the weights if they are the best."""
        state = self.state
        row = {
            "step": state.step,
            "epoch": state.step / self.feed.steps_per_epoch,
            "lr": self._learning_rate(state.step - 1),
            "train_loss": state.meter.mean(),
            **measured,
            "images_per_second": (state.step - self._logged_at) * self.run.batch_size / seconds,
            "peak_mib": peak_mib(self.device),
            "seconds": state.seconds,
            **self._row_extras(),
        }
        state.evaluated = self._logged_at = state.step
        score = measured[self.task.score]
        better = score > state.best_score
        if better:
            state.best_score, state.best_step = score, state.step
        if self.accelerator.is_main_process:
            self.folder.append_log(row)
            if better:
                best = {"step": state.step, self.task.score: score}
                checkpoint.write(self.folder.best, {"model": net.state_dict()}, best)
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=state.step)
        self.report.evaluation(row)

    def _share_buffers(self) -> None:
        """Before weights are used or kept: the main process's buffers (BatchNorm's) are the run's."""
        if self.accelerator.num_processes > 1:
            for buffer in self.state.net.buffers():
                buffer.copy_(broadcast(buffer))
        self.state.copy_buffers()

    def _tick(self) -> float:
        """Add the time since the last look to the run's; returns the seconds of training since the last log row."""
        now = time.perf_counter()
        self.state.seconds += now - self._mark
        self._mark = now
        return now - self._logged_time

    # Saving, stopping, going on

    def _stop_signal(self) -> int:
        return agree(self.accelerator, int(self.stop.received))[0]

    def _save_or_stop(self) -> None:
        """At a step boundary: save if it is time, and leave if any process was asked to."""
        step, several = self.state.step, self.accelerator.num_processes > 1
        fixed = self.run.checkpoint_every is not None and step % self.run.checkpoint_every == 0
        if several and not fixed and self.device.type != "cpu" and step % POLL_STEPS:
            return
        save, number = agree(self.accelerator, int(fixed or self._time_to_save()), int(self.stop.received))
        if number:
            self._save_and_leave(number)
        elif save:
            self._save()

    def _time_to_save(self) -> bool:
        if self.run.checkpoint_every is not None or not self.accelerator.is_main_process:
            return False
        enough = 2 * (self.state.step - self._saved_at) >= self.feed.steps_per_epoch
        return enough and time.perf_counter() - self._saved_time >= SAVE_SECONDS

    def _save_and_leave(self, number: int) -> NoReturn:
        self._save()
        step = self.state.step
        self.report.note(f"stopped at step {step} of {self.total} and saved; the same command goes on from there")
        raise TrainingStopped(number)

    def _save(self) -> None:
        """Write the checkpoint `last`; the one before becomes `previous`."""
        self._flush()
        self._share_buffers()
        if not self.state.finite():
            self._fail("training loss after the last update", float("nan"), self.state.step)
        self._tick()
        content = self.state.tensors(), self.state.values()
        if self.accelerator.is_main_process:
            checkpoint.write(self.folder.last, *content, previous=self.folder.previous)
        now = time.perf_counter()
        self._logged_time += now - self._mark  # saving is not training
        self._mark = self._saved_time = now
        self._saved_at = self.state.step

    def _resume(self) -> None:
        """Go on from the newest readable checkpoint, and drop what was logged after it."""
        folder, tensors, values, problems = self.folder.checkpoint()
        for problem in problems:
            self.report.note(f"{problem}; using {folder} instead")
        self.accelerator.wait_for_everyone()  # all have read before anyone writes
        if folder is not None:
            self.state.load(tensors, values)
            self.report.note(f"going on from step {self.state.step} of {self.total}")
        if self.accelerator.is_main_process:
            self.folder.rewind(self.state.step, self.state.evaluated)
