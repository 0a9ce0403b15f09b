"""The kernel's source in a program of its own: under sanitizers, and as lesser processors would run it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import ROOT

SOURCE = ROOT / "plugins" / "cpu" / "core_attention.cpp"

DRIVER = """
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>
#ifdef BASELINE_ALONE  // a third of the code to compile; the system's headers, which need the name, have been read
#undef __x86_64__
#endif
#include "SOURCE"

// A plain team of threads, which a sanitizer can follow.
extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> team;
    for (unsigned i = 1; i < threads; ++i) team.emplace_back(work, data);
    work(data);
    for (auto& thread : team) thread.join();
}

std::mt19937 random_bits(1);
const int kv_heads = 16, group = 2, heads = kv_heads * group, pool = 50;

float half(uint16_t bits) { return std::ldexp(1024 + (bits & 1023), (bits >> 10 & 31) - 25); }  // normal ones, positive

// A pool of random rows: as bytes of a format, no more than there are, and as what they mean.
struct Pool {
    int format, dim, units;  // of a record
    std::vector<uint8_t> bytes;
    std::vector<double> values, coarse;  // [pool, kv_heads, dim]

    Pool(int format, int dim) : format(format), dim(dim), values(pool * kv_heads * dim), coarse(values.size()) {
        format < 3 ? exact() : packed();
    }

    void packed() {
        const int size = format == 4 ? std::gcd(dim, 32) : dim, groups = dim / size, nibbles = kv_heads * dim / 2;
        const int upper = (2 * kv_heads * groups + 15) / 16, lower = upper + (nibbles + 15) / 16;
        units = format == 4 ? lower : 2 * lower - upper;
        bytes.resize(16 * units * pool);
        for (auto& byte : bytes) byte = uint8_t(random_bits());
        for (int r = 0; r < pool; ++r)
            for (int h = 0; h < kv_heads; ++h)
                for (int i = 0; i < dim; ++i) {
                    uint8_t* record = &bytes[16 * units * r];
                    const uint16_t bits = uint16_t((format == 4 ? 0x2400 : 0x1400) + 17 * r + h + i / size);
                    std::memcpy(record + 2 * (h * groups + i / size), &bits, 2);
                    const int byte = h * dim / 2 + i % (dim / 2), shift = i < dim / 2 ? 0 : 4;
                    const double scale = half(bits), first = record[16 * upper + byte] >> shift & 15;
                    const double second = format == 4 ? 0 : record[16 * lower + byte] >> shift & 15;
                    const int place = (r * kv_heads + h) * dim + i;
                    values[place] = format == 4 ? (first - 8) * scale : (first * 16 + second - 128) * scale;
                    coarse[place] = format == 4 ? values[place] : (first * 16 + 8 - 128) * scale;
                }
    }

    void exact() {
        std::normal_distribution<float> normal;
        units = 1;
        bytes.resize(values.size() * (format ? 2 : 4));
        for (size_t i = 0; i < values.size(); ++i) {
            float x = normal(random_bits);
            uint32_t bits;
            std::memcpy(&bits, &x, 4);
            bits &= 0xffff0000u;  // what a bfloat16 can say
            std::memcpy(&x, &bits, 4);
            const uint16_t narrow = format == 1 ? bits >> 16 : 0x3000 + i % 5000;
            values[i] = coarse[i] = format == 2 ? half(narrow) : x;
            if (format) std::memcpy(&bytes[2 * i], &narrow, 2);
            else std::memcpy(&bytes[4 * i], &x, 4);
        }
    }
};

// What a batch of two reads of one format.
struct Selection {
    std::vector<int32_t> rows, offsets;
    Pool keys, values;

    Selection(int format, int dim, int first, int second)
        : rows(first + second), offsets{0, first, first + second}, keys(format, dim), values(format, dim) {
        for (auto& id : rows) id = int32_t(random_bits() % pool) * keys.units;
    }
    Part part(bool coarse) const {
        const int64_t dim = keys.dim, row = kv_heads * dim;
        return {keys.bytes.data(), values.bytes.data(), rows.data(), offsets.data(), row, dim, row, dim,
                int64_t(pool - 1) * keys.units + 1, int64_t(rows.size()), coarse && keys.format == 3 ? 5 : keys.format,
                values.format};
    }
};

// The largest difference to a plain softmax over the rows of both selections.
double worst_of(const Selection (&read)[2], const std::vector<float>& query, const std::vector<float>& out,
                const std::vector<float>& scores, bool coarse) {
    const int dim = read[0].keys.dim;
    double worst = 0;
    std::vector<double> mean(scores.size());
    for (int head = 0; head < 2 * heads; ++head) {
        std::vector<double> expected(dim);
        double mass = 0;
        for (int pass = 0; pass < 2; ++pass)
            for (int c = 0, entry = 0; c < 2; entry += int(read[c++].rows.size()))
                for (int j = read[c].offsets[head / heads]; j < read[c].offsets[head / heads + 1]; ++j) {
                    const auto& keys = coarse ? read[c].keys.coarse : read[c].keys.values;
                    const int at = (read[c].rows[j] / read[c].keys.units * kv_heads + head % heads / group) * dim;
                    double logit = 0;
                    for (int i = 0; i < dim; ++i) logit += double(query[head * dim + i]) * keys[at + i];
                    const double weight = std::exp(0.1f * logit);
                    if (!pass) mass += weight;
                    else mean[entry + j] += weight / mass / heads;
                    for (int i = 0; pass && i < dim; ++i) expected[i] += weight / mass * read[c].values.values[at + i];
                }
        for (int i = 0; !coarse && i < dim; ++i) worst = std::max(worst, std::abs(out[head * dim + i] - expected[i]));
    }
    for (size_t j = 0; j < scores.size(); ++j) worst = std::max(worst, std::abs(scores[j] - mean[j]));
    return worst;
}

// Whether all numbers of 16 bits become the floats that they are, and these floats the same numbers again.
template <class Narrow> bool converts_all(double (*meaning)(int)) {
    for (int first = 0; first < 1 << 16; first += kLanes) {
        Narrow narrow[kLanes], again[kLanes];
        float wide[kLanes];
        for (int i = 0; i < kLanes; ++i) narrow[i] = {uint16_t(first + i)};
        store(wide, load(narrow));
        store(again, load(wide), kLanes);
        for (int i = 0; i < kLanes; ++i) {
            const double expected = meaning(first + i);
            const bool same = std::memcmp(&narrow[i], &again[i], 2) == 0;
            if (std::isnan(expected) ? !std::isnan(wide[i]) : wide[i] != expected || !same) return false;
        }
    }
    return true;
}

double meaning_of_half(int bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double finite = std::ldexp(exponent ? 1024 + mantissa : mantissa, std::max(exponent, 1) - 25);
    const double magnitude = exponent < 31 ? finite : mantissa ? NAN : INFINITY;
    return bits >> 15 ? -magnitude : magnitude;
}

double meaning_of_bfloat(int bits) {
    const uint32_t word = uint32_t(bits) << 16;
    float number;
    std::memcpy(&number, &word, 4);
    return number;
}

int main() {
    if (!converts_all<Half>(meaning_of_half) || !converts_all<Bfloat>(meaning_of_bfloat)) return 5;
    double worst = 0;
    for (int dim : {1, 2, 20, 48, 64, 80, 96, 128})
        for (int format : {0, 1, 2, 3, 4})
            for (int count : {0, 5, 130})
                for (bool coarse : {false, true}) {
                    if (format > 2 && dim % 2) continue;
                    Selection read[2] = {{format, dim, count, 7}, {0, dim, 3, 0}};
                    Part parts[2] = {read[0].part(coarse), read[1].part(coarse)};
                    std::normal_distribution<float> normal;
                    std::vector<float> query(2 * heads * dim), out(query.size()), scores(count + 10);
                    for (auto& x : query) x = normal(random_bits);
                    const auto call = [&](float* to, float* weights) {
                        const Call asked{query.data(), to, weights, 2, 2, heads, kv_heads, dim, 0, 3, 0.1f};
                        return avl_attend(&asked, parts);
                    };
                    if (call(coarse ? nullptr : out.data(), scores.data())) return 1;
                    worst = std::max(worst, worst_of(read, query, out, scores, coarse));
                    read[0].rows[0] = int32_t(parts[0].id_limit);
                    if (call(out.data(), nullptr) != ERANGE) return 2;
                    ++read[0].offsets[0];
                    if (call(out.data(), nullptr) != EINVAL) return 4;
                }
    std::printf("%g\\n", worst);
    return worst < 1e-5 ? 0 : 3;
}
"""


def run_driver(tmp_path: Path, *flags: str, cxx: str = os.environ.get("CXX", "c++"), emulator: str = "") -> None:
    compiler = shutil.which(cxx)
    if compiler is None or not SOURCE.is_file():
        pytest.skip("needs a C++ compiler and the source tree")
    driver = tmp_path / "driver.cpp"
    driver.write_text(DRIVER.replace("SOURCE", str(SOURCE)))
    command = [compiler, "-std=c++17", "-pthread", *flags, str(driver), "-o", str(tmp_path / "driver")]
    subprocess.run(command, check=True, timeout=600)
    run = [*([emulator] if emulator else []), str(tmp_path / "driver")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizer", "level"), [pytest.param("address", "-O0", marks=pytest.mark.long), ("thread", "-O1")]
)
def test_sanitizers(tmp_path: Path, sanitizer: str, level: str) -> None:
    """At the level of optimisation at which compiling and running together take least."""
    run_driver(tmp_path, "-DBASELINE_ALONE", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", level)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one instruction set")
@pytest.mark.parametrize(
    "flag",
    [
        pytest.param("-DBASELINE_ALONE", marks=pytest.mark.long, id="baseline"),
        pytest.param('-D__builtin_cpu_supports(name)=(sizeof(name) <= sizeof("avx2"))', id="avx2"),
    ],
)
def test_instruction_sets_of_lesser_processors(tmp_path: Path, flag: str) -> None:
    """The processor at hand chooses one of the item functions: here it says that it knows less than it does."""
    run_driver(tmp_path, "-O3" if "avx2" in flag else "-O1", flag)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() == "aarch64", reason="all other tests run the kernel on this processor")
def test_on_arm(tmp_path: Path) -> None:
    """The instruction set of a Jetson's processor, emulated."""
    cxx, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if not shutil.which(cxx) or not shutil.which(emulator):
        pytest.skip("needs a compiler for Arm and an emulator: apt-get install g++-aarch64-linux-gnu qemu-user")
    run_driver(tmp_path, "-O3", "-static", cxx=cxx, emulator=emulator)
