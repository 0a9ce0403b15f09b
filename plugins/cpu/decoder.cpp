// A decode step of all layers and sequences: embedding, for each layer norm, query, key and value, RoPE, the new rows
// into the pool, attention over the rows that are listed (core_attention.cpp), output, norm and gated MLP; then norm
// and head.
//
// Between products everything is in float, in the caller's thread as long as it is little. Work is cut by rows of
// weights and by sequences, never within a sum: what a sequence gets depends, to the last bit, neither on its
// neighbours nor on threads.

#include "decoder.h"

#include <cerrno>
#include <memory>
#include <new>
#include <system_error>
#include <vector>

#include "matrices.h"
#include "records.h"
#include "team.h"

namespace {
__attribute__((noinline)) void normalise(const float* from, const float* weights, int size, float epsilon, float* to) {
    Floats squares = {};
    each_vector(size, [&](int i, int lanes) INLINE {
        const Floats values = load(from + i, lanes);
        squares += values * values;
    });
    const float factor = 1 / std::sqrt(sum(squares) / size + epsilon);
    for (int i = 0; i < size; ++i) to[i] = weights[i] * (from[i] * factor);
}

// silu(gate) * up, where silu(x) = x / (1 + e^-x), into `gate`.
void gated(float* gate, const float* up, int64_t count) {
    each_vector(int(count), [&](int i, int lanes) INLINE {
        const Floats x = load(gate + i, lanes), zero = {};
        const Floats small = exponential(x < zero ? x : -x);
        const Floats sigmoid = (x < zero ? small : zero + 1.0f) / (small + 1.0f);
        store(gate + i, x * sigmoid * load(up + i, lanes), lanes);
    });
}

void rotate(float* head, const float* cosines, const float* sines, int dim) {
    const int half = dim / 2;
    for (int i = 0; i < half; ++i) {
        const float first = head[i], second = head[i + half];
        head[i] = first * cosines[i] - second * sines[i];
        head[i + half] = second * cosines[i + half] + first * sines[i + half];
    }
}

float exact(int type, const void* from, int64_t at) {
    if (type == 0) return static_cast<const float*>(from)[at];
    const Words bits = Words{} + static_cast<const uint16_t*>(from)[at];
    return type == 1 ? widen(bits, Bfloat())[0] : widen(bits, Half())[0];
}
void read_exact(int type, const void* from, int64_t begin, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = exact(type, from, begin + i);
}
void write_exact(int type, const float* from, void* to, int64_t begin, int64_t count) {
    each_vector(int(count), [&](int i, int lanes) INLINE {
        const Floats values = load(from + i, lanes);
        if (type == 0) store(static_cast<float*>(to) + begin + i, values, lanes);
        else if (type == 1) store(static_cast<Bfloat*>(to) + begin + i, values, lanes);
        else store(static_cast<Half*>(to) + begin + i, values, lanes);
    });
}
int64_t type_bytes(int type) { return type ? 2 : 4; }

struct OpenDecoder {
    Decoder model;
    std::vector<Layer> layers;
    std::vector<std::vector<Kernel>> kernels;  // of a layer's matrices, in their order
    Kernel head;
    Team team;

    explicit OpenDecoder(const Decoder& given)
        : model(given), layers(given.layers, given.layers + given.count), head(kernel_for(given.head.format)),
          team(given.threads) {
        model.layers = layers.data();
        for (const Layer& layer : layers) {
            kernels.emplace_back();
            for (const Matrix* matrix : {&layer.query, &layer.key, &layer.value, &layer.out, &layer.gate, &layer.up,
                                         &layer.down})
                kernels.back().push_back(kernel_for(matrix->format));
        }
    }
    int64_t width() const { return int64_t(model.kv_heads) * model.dim; }  // elements of a row's key
    int64_t record(int format, bool key) const {
        return record_bytes(format == kInt8 || (format == kInt8Int4 && key), model.kv_heads, model.dim);
    }
    uint8_t* arena(int format, bool key) const {
        uint8_t* const keys = static_cast<uint8_t*>(model.keys);
        if (format == kInt8Int4) return key ? keys : keys + record(format, true);
        return key ? keys : static_cast<uint8_t*>(model.values);
    }
    int64_t id_limit(int format) const {
        if (format == kExact) return model.pool_bytes / (width() * type_bytes(model.type));
        const int64_t rest = format == kInt8Int4 ? 2 * model.pool_bytes - record(format, true) - record(format, false)
                                                 : model.pool_bytes - record(format, true);
        return rest < 0 ? 0 : rest / kUnit + 1;
    }
};

bool is_sound(const Decoder& model) {
    const int64_t hidden = model.hidden, queries = int64_t(model.heads) * model.dim;
    const int64_t keys = int64_t(model.kv_heads) * model.dim;
    bool sound = model.layers && model.norm && model.keys && model.values && model.count > 0 && model.threads > 0 &&
                 model.kv_heads > 0 && model.heads > 0 && model.heads % model.kv_heads == 0 && model.dim > 0 &&
                 model.dim % 2 == 0 && model.type >= 0 && model.type <= 2 && model.pool_bytes > 0 &&
                 static_cast<uint8_t*>(model.keys) + model.pool_bytes == model.values;
    sound = sound && model.embedding.format < kCodes8 && is_sound(model.embedding, model.embedding.outputs, hidden) &&
            is_sound(model.head, model.head.outputs, hidden);
    for (int n = 0; sound && n < model.count; ++n) {
        const Layer& layer = model.layers[n];
        const int64_t inner = layer.gate.outputs;
        sound = layer.attention_norm && layer.mlp_norm && is_sound(layer.query, queries, hidden) &&
                is_sound(layer.key, keys, hidden) && is_sound(layer.value, keys, hidden) &&
                is_sound(layer.out, hidden, queries) && is_sound(layer.gate, inner, hidden) &&
                is_sound(layer.up, inner, hidden) && is_sound(layer.down, hidden, inner);
    }
    return sound;
}

int refusal(const OpenDecoder& open, const DecodeStep& step) {
    const Decoder& model = open.model;
    if (step.batch < 1 || step.capacity < 0) return EINVAL;
    for (int b = 0; b < step.batch; ++b) {
        if (step.tokens[b] < 0 || step.tokens[b] >= model.embedding.outputs) return ERANGE;
        if (step.written[b] < 0 || step.written[b] >= kFormats) return EINVAL;
    }
    for (int i = 0; i < model.count * step.batch; ++i) {
        if (step.slots[i] < 0 || step.slots[i] >= open.id_limit(step.written[i % step.batch])) return ERANGE;
        if (step.smoothing[i] >= open.id_limit(kExact)) return ERANGE;
    }
    const int lists = kFormats * step.batch;
    for (int layer = 0; layer < model.count; ++layer) {
        const int32_t* offsets = step.offsets + int64_t(layer) * (lists + 1);
        if (offsets[0] != 0 || offsets[lists] > step.capacity) return EINVAL;
        for (int list = 0; list < lists; ++list) {
            if (offsets[list] > offsets[list + 1]) return EINVAL;
            const int64_t limit = open.id_limit(list / step.batch);
            for (int32_t i = offsets[list]; i < offsets[list + 1]; ++i) {
                const int32_t id = step.rows[layer * step.capacity + i];
                if (id < 0 || id >= limit) return ERANGE;
            }
        }
    }
    return 0;
}

class Run {
  public:
    Run(OpenDecoder& open, const DecodeStep& step)
        : open_(open), model_(open.model), step_(step), queries_(int64_t(model_.heads) * model_.dim),
          width_(open.width()) {
        const int64_t batch = step.batch, inner = model_.layers[0].gate.outputs;
        for (std::vector<float>* each : {&hidden_, &normed_, &out_}) each->resize(batch * model_.hidden);
        query_.resize(batch * queries_), attended_.resize(batch * queries_);
        key_.resize(batch * width_), value_.resize(batch * width_), smoothed_.resize(batch * 2 * width_);
        gate_.resize(batch * inner), up_.resize(batch * inner);
    }

    void all() {
        for (int b = 0; b < step_.batch; ++b)
            read_exact(int(model_.embedding.format), model_.embedding.data, int64_t(step_.tokens[b]) * model_.hidden,
                       model_.hidden, hidden_.data() + int64_t(b) * model_.hidden);
        for (int layer = 0; layer < model_.count; ++layer) {
            attention(layer);
            mlp(layer);
        }
        normalise_all(model_.norm);
        Output logits{&model_.head, open_.head, step_.logits, nullptr};
        multiply(open_.team, normed_.data(), step_.batch, &logits, 1, kNothing);
    }

  private:
    void normalise_all(const float* weights) {
        share(open_.team, step_.batch, [&](int b) {
            normalise(hidden_.data() + int64_t(b) * model_.hidden, weights, model_.hidden, model_.epsilon,
                      normed_.data() + int64_t(b) * model_.hidden);
        });
    }

    // Adds a product to the hidden states.
    void add(const Matrix& matrix, const Kernel& kernel, const float* vectors) {
        Output output{&matrix, kernel, out_.data(), nullptr};
        multiply(open_.team, vectors, step_.batch, &output, 1, [&](int, int64_t begin, int64_t end) {
            for (int64_t b = 0; b < step_.batch; ++b)
                for (int64_t i = begin; i < end; ++i) hidden_[b * model_.hidden + i] += out_[b * model_.hidden + i];
        });
    }

    void attention(int index) {
        const Layer& layer = model_.layers[index];
        const std::vector<Kernel>& kernels = open_.kernels[index];
        normalise_all(layer.attention_norm);
        Output outputs[] = {{&layer.query, kernels[0], query_.data(), nullptr},
                            {&layer.key, kernels[1], key_.data(), nullptr},
                            {&layer.value, kernels[2], value_.data(), nullptr}};
        multiply(open_.team, normed_.data(), step_.batch, outputs, 3, kNothing);
        share(open_.team, step_.batch, [&](int b) { append(index, b); });
        attend_rows(index);
        add(layer.out, kernels[3], attended_.data());
    }

    void mlp(int index) {
        const Layer& layer = model_.layers[index];
        const std::vector<Kernel>& kernels = open_.kernels[index];
        const int64_t inner = layer.gate.outputs;
        normalise_all(layer.mlp_norm);
        Output outputs[] = {{&layer.gate, kernels[4], gate_.data(), nullptr},
                            {&layer.up, kernels[5], up_.data(), nullptr}};
        multiply(open_.team, normed_.data(), step_.batch, outputs, 2, kNothing);
        share(open_.team, step_.batch, [&](int b) { gated(gate_.data() + b * inner, up_.data() + b * inner, inner); });
        add(layer.down, kernels[6], gate_.data());
    }

    // Norm, where heads have one, and RoPE.
    void turn(float* vectors, int heads, const float* norm, const float* cosines, const float* sines) {
        for (float* head = vectors; head < vectors + heads * model_.dim; head += model_.dim) {
            if (norm) normalise(head, norm, model_.dim, model_.epsilon, head);
            rotate(head, cosines, sines, model_.dim);
        }
    }

    // Turns a sequence's query and key, and puts its new row into the pool.
    void append(int index, int b) {
        const int dim = model_.dim, group = model_.heads / model_.kv_heads;
        float* query = query_.data() + b * queries_;
        float *key = key_.data() + b * width_, *value = value_.data() + b * width_;
        const float *cosines = step_.cosines + int64_t(b) * dim, *sines = step_.sines + int64_t(b) * dim;
        const Layer& layer = model_.layers[index];
        turn(query, model_.heads, layer.query_norm, cosines, sines);
        turn(key, model_.kv_heads, layer.key_norm, cosines, sines);
        const int64_t at = int64_t(index) * step_.batch + b;
        if (const int64_t smoothing = step_.smoothing[at]; smoothing >= 0) {
            float *center = smoothed_.data() + b * 2 * width_, *scale = center + width_;
            read_exact(model_.type, model_.keys, smoothing * width_, width_, center);
            read_exact(model_.type, model_.values, smoothing * width_, width_, scale);
            for (int64_t i = 0; i < width_; ++i) key[i] = (key[i] - center[i]) / scale[i];
            for (int64_t i = 0; i < queries_; ++i) query[i] *= scale[i / dim / group * dim + i % dim];
        }
        const int64_t slot = step_.slots[at];
        const int format = step_.written[b];
        if (format == kExact) {
            write_exact(model_.type, key, model_.keys, slot * width_, width_);
            write_exact(model_.type, value, model_.values, slot * width_, width_);
        } else {
            const bool wide_key = format != kInt4, wide_value = format == kInt8;
            encode(wide_key, key, model_.kv_heads, dim, open_.arena(format, true) + slot * kUnit);
            encode(wide_value, value, model_.kv_heads, dim, open_.arena(format, false) + slot * kUnit);
        }
    }

    void attend_rows(int index) {
        const int batch = step_.batch, lists = kFormats * batch;
        const int32_t* offsets = step_.offsets + int64_t(index) * (lists + 1);
        const int32_t* rows = step_.rows + index * step_.capacity;
        std::vector<Part> parts;
        std::vector<int32_t> own(lists + kFormats);
        for (int format = 0; format < kFormats; ++format) {
            const int32_t *from = offsets + format * batch, listed = from[batch] - from[0];
            if (!listed) continue;
            int32_t* to = own.data() + format * (batch + 1);
            for (int b = 0; b <= batch; ++b) to[b] = from[b] - from[0];
            const int64_t row = format == kExact ? width_ : 0, head = format == kExact ? model_.dim : 0;
            const int key = format == kExact ? model_.type : format == kInt4 ? 4 : 3;
            const int value = format == kExact ? model_.type : format == kInt8 ? 3 : 4;
            parts.push_back({open_.arena(format, true), open_.arena(format, false), rows + from[0], to, row, head, row,
                             head, open_.id_limit(format), listed, key, value});
        }
        float* scores = step_.scores ? step_.scores + index * step_.capacity : nullptr;
        attend({query_.data(), attended_.data(), scores, int32_t(parts.size()), batch, model_.heads, model_.kv_heads,
                model_.dim, 0, open_.team.seats, model_.scale},
               parts.data(), open_.team);
    }

    OpenDecoder& open_;
    const Decoder& model_;
    const DecodeStep& step_;
    const int64_t queries_, width_;
    std::vector<float> hidden_, normed_, out_, query_, key_, value_, smoothed_, attended_, gate_, up_;
};
}  // namespace

// The number of the structures of decoder.h and step.h: it grows when one of them changes.
extern "C" int32_t avl_interface() { return 2; }

// A decoder with a team of threads of its own, to be closed; null and errno, EINVAL for what does not fit together,
// EAGAIN where the system gives no more threads, or ENOMEM.
extern "C" void* avl_decoder_open(const Decoder* model) try {
    if (is_sound(*model)) return new OpenDecoder(*model);
    errno = EINVAL;
    return nullptr;
} catch (const std::bad_alloc&) {
    errno = ENOMEM;
    return nullptr;
} catch (const std::system_error&) {
    errno = EAGAIN;
    return nullptr;
}

// In a forked process nothing is freed, since the threads that would have to end are not there.
extern "C" void avl_decoder_close(void* decoder) {
    OpenDecoder* open = static_cast<OpenDecoder*>(decoder);
    if (open && !open->team.is_forked()) delete open;
}

// 0; EINVAL for a table that does not fit, ERANGE for a token or row that is none, and then nothing was written; or
// ENOMEM. One step at a time.
extern "C" int32_t avl_decoder_step(void* decoder, const DecodeStep* step) try {
    OpenDecoder& open = *static_cast<OpenDecoder*>(decoder);
    if (const int status = refusal(open, *step)) return status;
    struct Awake {
        Team& team;
        explicit Awake(Team& team) : team(team) { team.begin(); }
        ~Awake() { team.end(); }
    } const awake(open.team);
    Run(open, *step).all();
    return 0;
} catch (const std::bad_alloc&) { return ENOMEM; }

// A matrix by vectors [batch, inputs], as a step multiplies them: out [batch, outputs], `times` times. 0, EINVAL,
// EAGAIN or ENOMEM.
extern "C" int32_t avl_multiply(const Matrix* matrix, const float* vectors, float* out, int32_t batch, int32_t threads,
                                int32_t times) try {
    if (batch < 1 || threads < 1 || !is_sound(*matrix, matrix->outputs, matrix->inputs)) return EINVAL;
    Team team(threads);
    team.begin();
    Output output{matrix, kernel_for(matrix->format), out, nullptr};
    for (int i = 0; i < times; ++i) multiply(team, vectors, batch, &output, 1, kNothing);
    return 0;
} catch (const std::bad_alloc&) {
    return ENOMEM;
} catch (const std::system_error&) {
    return EAGAIN;
}
