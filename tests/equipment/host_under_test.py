"""The CPU in the place of a GPU that tools/gpu checks: with reference kernels, or with some that are wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from avl_edge.attention.cuda import Kernels, KernelShape
from avl_edge.attention.cuda.driver import Argument, Grid
from tests.equipment.cuda_on_cpu import HostDevice, ReferenceModule, at
from tools.gpu.dut import row_type


class HostUnderTest:
    """The CPU, with reference kernels, or those that ``make`` gives."""

    def __init__(self, make: Callable[[KernelShape, torch.dtype], ReferenceModule] = ReferenceModule) -> None:
        self.accelerator = HostDevice()
        self._make = make

    def kernels(self, shape: KernelShape) -> Kernels:
        module = self._make(shape, row_type(shape))
        return Kernels(module, shape, packed=module.packed)


class Wrong(ReferenceModule):
    """Reference kernels, of which one does its work a little wrong."""

    def __init__(self, fault: str, shape: KernelShape, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self._fault = fault

    def launch(self, kernel: str, grid: Grid, threads: int, stream: int, arguments: Sequence[Argument]) -> None:
        if self._fault == "nothing is appended" and kernel == "avl_append":
            return
        if self._fault == "positions are one off" and kernel == "avl_attend_low_rank":
            positions = at(arguments[6], torch.int32, int(at(arguments[5], torch.int32, grid[2]).max()))
            positions -= 1
            super().launch(kernel, grid, threads, stream, arguments)
            positions += 1
            return
        super().launch(kernel, grid, threads, stream, arguments)
        getattr(self, self._fault.replace(" ", "_"), lambda *_: None)(kernel, grid, arguments)

    def a_score_is_off(self, kernel: str, _: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_scores":
            at(arguments[6], torch.float32, 1)[0] += 1e-3

    def scores_run_over(self, kernel: str, _: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_scores":
            capacity = int(arguments[5].value or 0)
            at(arguments[6], torch.float32, capacity)[-1] = 0

    def an_output_is_off(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_merge":
            out = at(arguments[7], self._dtype, grid[1], int(arguments[4].value or 0), self._dim)
            out[1, 0, 0] += 1

    def an_empty_selection_is_left_alone(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_merge":
            counts = at(arguments[2], torch.int32, grid[1] + 1).diff()
            out = at(arguments[7], self._dtype, grid[1], int(arguments[4].value or 0), self._dim)
            out[counts == 0] = float("nan")

    def neighbours_matter(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_merge":
            out = at(arguments[7], self._dtype, grid[1], int(arguments[4].value or 0), self._dim)
            out *= 1 + 0.02 * (grid[1] > 1)

    def a_packed_part_is_left_out(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_attend" and not self._format.is_exact:
            splits, heads = int(arguments[12].value or 0), grid[0] * self._group
            first = int(arguments[11].value or 0)
            at(arguments[14], torch.float32, grid[2], splits, heads, 2)[:, first] = torch.tensor([-3e38, 0.0])

    def a_low_rank_part_is_left_out(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_attend_low_rank":
            splits, heads = int(arguments[16].value or 0), grid[0] * self._group
            first = int(arguments[15].value or 0)
            at(arguments[21], torch.float32, grid[2], splits, heads, 2)[:, first] = torch.tensor([-3e38, 0.0])

    def a_query_is_not_smoothed(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_smooth":
            at(arguments[0], self._dtype, grid[1], grid[0] * self._group, self._dim)[0, -1] += 1

    def all_keys_are_smoothed(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_smooth":
            is_smoothed = at(arguments[2], torch.int32, grid[1]) >= 0
            at(arguments[1], self._dtype, grid[1], grid[0], self._dim)[~is_smoothed] /= 2

    def a_scale_is_off(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_append" and not self._format.is_exact:
            ids = at(arguments[2], torch.int32, grid[0])
            records = self._records(arguments[8], self._format.keys, ids[ids >= 0], int(arguments[3].value or 0))
            records[ids[0].long(), 1] ^= 1

    def a_record_runs_over(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_append" and not self._format.is_exact:
            ids = at(arguments[2], torch.int32, grid[0])
            size = self._records(arguments[9], self._format.values, ids[ids >= 0], int(arguments[3].value or 0)).shape[
                1
            ]
            at(arguments[9], torch.uint8, size + 1)[size] = 0

    def a_scan_is_off(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_scan" and self._format.name == "int8":
            begin = int(at(arguments[3], torch.int32, grid[2])[1])
            at(arguments[8], torch.float32, begin + 1)[begin] += 1

    def one_row_too_many_is_chosen(self, kernel: str, _: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_nucleus":
            flags = at(arguments[8], torch.int8, 100)
            flags[flags == 0] = 1

    def a_prompts_last_is_off(self, kernel: str, _: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_prompt_scores":
            at(arguments[6], torch.float32, 1)[0] += 1e-3

    def a_prompts_total_is_off(self, kernel: str, _: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_prompt_scores":
            at(arguments[7], torch.float32, 1)[0] += 1e-3
