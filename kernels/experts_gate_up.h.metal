// ---- which expert --------------------------------------------------------------------------------------------------
// A choice is compared as a whole number, of which the order is that of the floats (a choice is never -0): the maximum
// of a simdgroup is then one instruction. 0 is less than any.
inline uint in_order(float choice) {
  const uint word = as_type<uint>(choice);
  return (word & 0x80000000u) != 0 ? ~word : word | 0x80000000u;
}

// What a lane knows of a token's experts: of lane, lane + 32, ... their scores, and their choices in order.
template <int PER_LANE>
struct Experts {
  float scores[PER_LANE];
  uint choices[PER_LANE];
};

template <int EXPERTS, int PER_LANE, bool SOFTMAX, bool HAS_BIAS>
inline Experts<PER_LANE> load_experts(const device float* router_logits, const device float* bias, uint lane) {
  Experts<PER_LANE> out;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const uint expert = uint(i) * 32 + lane;
    out.scores[i] = expert < uint(EXPERTS) ? router_logits[expert] : -INFINITY;
  }
  if (SOFTMAX) {
    float largest = out.scores[0];
#pragma unroll
    for (int i = 1; i < PER_LANE; ++i) {
      largest = max(largest, out.scores[i]);
    }
    largest = simd_max(largest);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      out.scores[i] = exp(out.scores[i] - largest);
      sum += out.scores[i];
    }
    sum = simd_sum(sum);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      out.scores[i] = out.scores[i] / sum;
    }
  } else {
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      out.scores[i] = 1.0f / (1.0f + exp(-out.scores[i]));
    }
  }
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const uint expert = uint(i) * 32 + lane;
    float choice = out.scores[i];
    if (HAS_BIAS && expert < uint(EXPERTS)) {
      choice += bias[expert];
    }
    // NaN compares with nothing: it is chosen last, and its weight is NaN.
    out.choices[i] = expert < uint(EXPERTS) ? in_order(isnan(choice) ? -INFINITY : choice) : 0u;
  }
  return out;
}

// The best expert that is left, by all lanes together: the largest choice, and of equals the lowest index. `score` is
// its score; from now on it is not left.
template <int PER_LANE>
inline uint take_best(thread Experts<PER_LANE>& left, uint lane, thread float& score) {
  uint best = left.choices[0];
  uint expert = lane;
  float own = left.scores[0];
#pragma unroll
  for (int i = 1; i < PER_LANE; ++i) {
    const bool better = left.choices[i] > best;
    best = better ? left.choices[i] : best;
    expert = better ? uint(i) * 32 + lane : expert;
    own = better ? left.scores[i] : own;
  }
  const uint winner = simd_min(best == simd_max(best) ? expert : 0xFFFFFFFFu);
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    left.choices[i] = winner == uint(i) * 32 + lane ? 0u : left.choices[i];
  }
  score = simd_shuffle(own, ushort(winner & 31u));
  return winner;
}

// ---- gate and up ---------------------------------------------------------------------------------------------------
// silu(gate x) * (up x) for rows first .. first + ROWS - 1, by one simdgroup; rows past `last` repeat it.
template <int ROWS, int DEPTH, int COLS, class G, class U, class T>
inline void swiglu_rows(
    G gate, U up, const device T* x, uint first, uint last, uint lane, thread float (&hidden)[ROWS]) {
  float gates[ROWS];
  float ups[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    gates[r] = 0.0f;
    ups[r] = 0.0f;
  }
  for (uint step = 0; step < uint(COLS / 8); step += 32 * DEPTH) {
    const uint begin = step + lane;
    Raw raw_gate[ROWS][DEPTH];
    Raw raw_up[ROWS][DEPTH];
    decltype(load_turn<DEPTH>(gate, 0u, 0u, 0u)) turn_gate[ROWS];
    decltype(load_turn<DEPTH>(up, 0u, 0u, 0u)) turn_up[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      turn_gate[r] = load_turn<DEPTH>(gate, min(first + uint(r), last), step, lane);
      turn_up[r] = load_turn<DEPTH>(up, min(first + uint(r), last), step, lane);
    }
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      if (has_chunk<COLS / 8, DEPTH * 32>(begin + uint(32 * d))) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const uint row = min(first + uint(r), last);
          raw_gate[r][d] = load_own(gate, row, begin, 32 * d);
          raw_up[r][d] = load_own(up, row, begin, 32 * d);
        }
      }
    }
    LOADS_END
    decltype(scales_of(gate, turn_gate[0], 0u)) scales_gate[ROWS];
    decltype(scales_of(up, turn_up[0], 0u)) scales_up[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      scales_gate[r] = scales_of(gate, turn_gate[r], lane);
      scales_up[r] = scales_of(up, turn_up[r], lane);
    }
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      decltype(of_chunk(gate, scales_gate[0], 0, 0u)) own_gate[ROWS];
      decltype(of_chunk(up, scales_up[0], 0, 0u)) own_up[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        own_gate[r] = of_chunk(gate, scales_gate[r], d, lane);
        own_up[r] = of_chunk(up, scales_up[r], d, lane);
      }
      if (has_chunk<COLS / 8, DEPTH * 32>(begin + uint(32 * d))) {
        const Eight x8 = load_eight(x, begin, 32 * d);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          gates[r] += dot(decode_own(gate, raw_gate[r][d], own_gate[r], begin), x8);
          ups[r] += dot(decode_own(up, raw_up[r][d], own_up[r], begin), x8);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float g = simd_sum(gates[r]);
    const float u = simd_sum(ups[r]);
    hidden[r] = g / (1.0f + exp(-g)) * u;
  }
}
