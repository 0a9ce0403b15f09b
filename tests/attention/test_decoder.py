"""The native step's products against float64, and its source under sanitizers and as lesser processors would run it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from avl_edge.attention.decoder import Matrix, multiply
from tests import ROOT
from tests.equipment.decode_attention import needs_native

PLUGINS = ROOT / "plugins" / "cpu"


def _check(matrix: Matrix, meaning: Tensor, vectors: Tensor, seen: Tensor) -> None:
    """Float32 sums of products of which each is off by half a unit in the last place at most; the same numbers for each
    vector alone and on one thread."""
    found = multiply(matrix, vectors, threads=2)
    bias = 0 if matrix.bias is None else matrix.bias.double()
    expected = seen.double() @ meaning.T + bias
    bound = (seen.double().abs() @ meaning.abs().T + abs(bias)) * 2**-20
    assert ((found - expected).abs() <= bound + 1e-30).all()
    for number in range(len(vectors)):
        assert torch.equal(multiply(matrix, vectors[number : number + 1]), found[number : number + 1])


sizes = {"outputs": st.integers(1, 70), "batch": st.integers(1, 6), "seed": st.integers(0, 2**31)}


@needs_native
@given(
    **sizes,
    inputs=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
)
def test_dense_products(outputs: int, inputs: int, batch: int, seed: int, dtype: torch.dtype, bias: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(outputs, inputs, generator=random).to(dtype)
    vectors = torch.randn(batch, inputs, generator=random)
    added = torch.randn(outputs, generator=random) if bias else None
    seen = vectors.bfloat16() if dtype == torch.bfloat16 else vectors
    _check(Matrix(weights, added), weights.double(), vectors, seen)


@needs_native
@given(**sizes, groups=st.integers(1, 5), group=st.integers(1, 130))
def test_products_of_codes_of_8_bits(outputs: int, groups: int, group: int, batch: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (outputs, groups * group), generator=random).to(torch.int8)
    scales = torch.rand(outputs, groups, generator=random)
    vectors = torch.randn(batch, groups * group, generator=random)
    meaning = codes.double() * scales.double().repeat_interleave(group, 1)
    _check(Matrix(codes, scales=scales), meaning, vectors, vectors)


@needs_native
@given(
    **sizes,
    groups=st.integers(1, 5),
    group=st.sampled_from([32, 64, 128, 256]),
    zeros=st.booleans(),
    rounds=st.booleans(),
)
def test_products_of_codes_of_4_bits(
    outputs: int, groups: int, group: int, batch: int, seed: int, zeros: bool, rounds: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (outputs, groups * group), generator=random).to(torch.uint8)
    scales = torch.rand(outputs, groups, generator=random)
    zero = torch.randint(0, 16, (outputs, groups), generator=random).to(torch.uint8) if zeros else None
    vectors = torch.randn(batch, groups * group, generator=random)
    offset = 8.0 if zero is None else zero.double().repeat_interleave(group, 1)
    meaning = (codes.double() - offset) * scales.double().repeat_interleave(group, 1)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    # A zero is taken off after the sums: what cancels there is as large as the code itself.
    largest = meaning.abs().maximum(16 * scales.double().repeat_interleave(group, 1))
    matrix = Matrix(packed, scales=scales, zeros=zero, rounds=rounds)
    found = multiply(matrix, vectors, threads=2)
    seen = (vectors.bfloat16() if rounds else vectors).double()
    assert ((found - seen @ meaning.T).abs() <= seen.abs() @ largest.T * 2**-20).all()
    for number in range(batch):
        alone = multiply(matrix, vectors[number : number + 1])
        assert torch.equal(alone, found[number : number + 1])


@needs_native
@pytest.mark.parametrize(
    "matrix",
    [
        Matrix(torch.zeros(4, 32, dtype=torch.int8)),
        Matrix(torch.zeros(4, 48, dtype=torch.uint8), scales=torch.ones(4, 2)),
        Matrix(torch.zeros(4, 32, dtype=torch.int8), scales=torch.ones(4, 3)),
        Matrix(torch.zeros(0, 32)),
    ],
    ids=["no scales", "a group of 48", "a group that does not divide", "no outputs"],
)
def test_matrices_that_are_none(matrix: Matrix) -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        multiply(matrix, torch.zeros(1, 32))


@needs_native
def test_weights_are_in_one_piece() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        multiply(Matrix(torch.zeros(4, 8).T), torch.zeros(1, 4))


DRIVER = """
#include <cstdio>
#include <random>
#include <vector>
#ifdef BASELINE_ALONE  // the system's headers, which need the name, have been read
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <unistd.h>
#undef __x86_64__
#endif
#include "decoder.cpp"

// Attention of one row is its value.
int32_t attend(const Call& call, const Part* parts, Workers& workers) {
    const auto work = [&](int i) {
        const float* row = static_cast<const float*>(parts[0].values) + parts[0].rows[i] * parts[0].value_row;
        std::copy_n(row, call.heads * call.dim, static_cast<float*>(call.out) + i * call.heads * call.dim);
    };
    workers.run(call.batch, [](const void* data, int i, int) { (*static_cast<decltype(work)*>(data))(i); }, &work);
    return 0;
}

int main() {
    std::mt19937 bits(1);
    const auto floats = [&](size_t count) {
        std::vector<float> made(count);
        for (float& each : made) each = float(int(bits() % 2001) - 1000) / 1000;
        return made;
    };
    const int dim = 16, hidden = 32, inner = 48, vocabulary = 300, batch = 3;
    std::vector<std::vector<float>> kept;
    const auto matrix = [&](int64_t outputs, int64_t inputs) {
        kept.push_back(floats(outputs * inputs));
        return Matrix{kept.back().data(), nullptr, nullptr, nullptr, outputs, inputs, 0, 0};
    };
    const std::vector<float> ones(hidden, 1.0f);
    const auto layer = [&](const float* heads) {
        return Layer{ones.data(), ones.data(), heads, heads, matrix(32, hidden), matrix(32, hidden), matrix(32, hidden),
                     matrix(hidden, 32), matrix(inner, hidden), matrix(inner, hidden), matrix(hidden, inner)};
    };
    const Layer layers[] = {layer(nullptr), layer(ones.data())};
    std::vector<float> pool(2 * 16 * 32), logits[2];
    const Matrix embedding = matrix(vocabulary, hidden), head = matrix(vocabulary, hidden);
    const int32_t tokens[] = {1, 2, 299}, slots[] = {0, 1, 2, 3, 4, 5}, written[] = {0, 0, 0};
    const int32_t smoothing[] = {-1, -1, -1, -1, -1, -1};
    std::vector<int32_t> offsets;
    for (int l = 0; l < 2; ++l)
        for (int list = 0; list <= 12; ++list) offsets.push_back(std::min(list, 3));
    const std::vector<float> angles = floats(batch * dim);
    for (int threads : {1, 4}) {
        const Decoder model{layers, ones.data(), embedding, head, pool.data(), pool.data() + 512, 4 * 512, 2, hidden, 2,
                            2, dim, 0, threads, 1e-5f, 0.25f};
        void* decoder = avl_decoder_open(&model);
        if (!decoder) return 1;
        std::vector<float>& out = logits[threads > 1];
        out.resize(batch * vocabulary);
        const DecodeStep step{tokens, slots, written, smoothing, slots, offsets.data(), angles.data(), angles.data(),
                              nullptr, out.data(), 3, batch};
        for (int i = 0; i < 50; ++i) {
            if (avl_decoder_step(decoder, &step)) return 2;
            if (i % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        avl_decoder_close(decoder);
    }
    if (logits[0] != logits[1]) return 3;
    std::printf("%.5f", std::abs(logits[0][7]));
    // Products of all formats with each processor's kernels, in order and on both sides of a block.
    const std::vector<uint8_t> codes(5 * 160, 0x5b), zeros(5 * 5, 3);
    const std::vector<float> scales(5 * 5, 0.5f), vectors(2 * 160, 1.0f);
    for (int format = 3; format < 6; ++format) {
        const uint8_t* zero = format > 3 ? zeros.data() : nullptr;
        const Matrix quantised{codes.data(), scales.data(), zero, nullptr, 5, 160, 32, format};
        std::vector<float> out(10);
        if (avl_multiply(&quantised, vectors.data(), out.data(), 2, 2, 1)) return 4;
        const float expected = 160 * 0.5f * (format == 3 ? 0x5b : 8 - 3);  // 0x5b: 11 and 5, 8 in the mean
        for (float each : out) if (each != expected) return 5;
    }
    return 0;
}
"""


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize("baseline", [False, True], ids=["this processor", "baseline"])
def test_source_is_clean_under_sanitizers(tmp_path: Path, sanitizer: str, baseline: bool) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = tmp_path / "driver.cpp", tmp_path / "driver"
    source.write_text(DRIVER)
    options = ["-std=c++17", "-O1", "-g1", "-pthread", f"-fsanitize={sanitizer}", f"-I{PLUGINS}"]
    options += ["-fno-sanitize-recover=all"] + (["-DBASELINE_ALONE"] if baseline else [])
    subprocess.run([compiler, *options, str(source), "-o", str(program)], check=True, timeout=600)
    # Without a fixed layout of memory the thread sanitizer of older compilers does not start on newer kernels.
    fixed = [setarch, "-R"] if sanitizer == "thread" and (setarch := shutil.which("setarch")) else []
    done = subprocess.run([*fixed, str(program)], capture_output=True, text=True, env=dict(os.environ), timeout=300)
    assert done.returncode == 0, done.stderr
