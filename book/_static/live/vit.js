// The vision transformer of cpvt/model, forward only, in double precision. Read it beside vit.py and encodings.py.
//
// Letters as there: C channels, p patch size, (H, W) grid, N = H * W patches, P prefix tokens, T = P + N tokens,
// D width, h heads, d = D / h. A matrix is a Float64Array, row after row; (T, D) says how many rows and columns.
// All of it is one function, so that a worker can be made of its source: a page from the disk may not load a file.
function visionTransformer() {
  "use strict";
  const EPSILON = 1e-6; // of every norm

  // ------------------------------------------------------------------ arithmetic

  /** Writes the products of one row of x with `count` rows of w, all of length n: where all the time is spent. */
  function products(x, at, w, from, count, n, out, to) {
    let j = 0, row = from;
    for (; j + 3 < count; j += 4, row += 4 * n) {
      const second = row + n, third = second + n, fourth = third + n;
      let a = 0, b = 0, c = 0, e = 0;
      for (let i = 0; i < n; i++) {
        const value = x[at + i];
        a += value * w[row + i];
        b += value * w[second + i];
        c += value * w[third + i];
        e += value * w[fourth + i];
      }
      out[to + j] = a;
      out[to + j + 1] = b;
      out[to + j + 2] = c;
      out[to + j + 3] = e;
    }
    for (; j < count; j++, row += n) {
      let a = 0;
      for (let i = 0; i < n; i++) a += x[at + i] * w[row + i];
      out[to + j] = a;
    }
  }

  /** (T, n), weight (m, n), bias (m) -> (T, m), as PyTorch keeps a linear layer. */
  function linear(x, weight, bias) {
    const m = bias.length, n = weight.length / m, T = x.length / n, out = new Float64Array(T * m);
    for (let t = 0; t < T; t++) {
      products(x, t * n, weight, 0, m, n, out, t * m);
      for (let j = 0; j < m; j++) out[t * m + j] += bias[j];
    }
    return out;
  }

  function layerNorm(x, weight, bias) {
    const D = weight.length, out = new Float64Array(x.length);
    for (let t = 0; t < x.length; t += D) {
      let mean = 0, variance = 0;
      for (let i = 0; i < D; i++) mean += x[t + i] / D;
      for (let i = 0; i < D; i++) variance += (x[t + i] - mean) ** 2 / D;
      const scale = 1 / Math.sqrt(variance + EPSILON);
      for (let i = 0; i < D; i++) out[t + i] = (x[t + i] - mean) * scale * weight[i] + bias[i];
    }
    return out;
  }

  /** In place: rows of n logits -> weights that sum to 1. */
  function softmax(x, from, n) {
    let top = -Infinity, sum = 0;
    for (let i = from; i < from + n; i++) top = Math.max(top, x[i]);
    for (let i = from; i < from + n; i++) sum += x[i] = Math.exp(x[i] - top);
    for (let i = from; i < from + n; i++) x[i] /= sum;
  }

  // The error function, which JavaScript lacks: at 97 places by its series of positive terms, between them by
  // Taylor's. Its derivatives at x are those of the bell curve: Hermite polynomials times exp(-x^2).
  const STEP = 1 / 16, ORDER = 10, NODES = 6 / STEP + 1, TAYLOR = new Float64Array(NODES * ORDER);
  for (let node = 0; node < NODES; node++) {
    const x = node * STEP, bell = (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x);
    let value = 0;
    for (let n = 0, term = bell * x; term > 1e-18 * value; term *= (2 * x * x) / (2 * ++n + 1)) value += term;
    TAYLOR[node * ORDER] = value;
    let last = 0, hermite = 1, factorial = 1;
    for (let n = 1; n < ORDER; n++) {
      factorial *= n;
      TAYLOR[node * ORDER + n] = ((n % 2 ? 1 : -1) * bell * hermite) / factorial;
      [last, hermite] = [hermite, 2 * x * hermite - 2 * (n - 1) * last];
    }
  }

  function erf(x) {
    const size = Math.abs(x);
    if (size >= 6) return Math.sign(x);
    const node = Math.round(size / STEP), rest = size - node * STEP;
    let value = 0;
    for (let n = ORDER - 1; n >= 0; n--) value = value * rest + TAYLOR[node * ORDER + n];
    return x < 0 ? -value : value;
  }

  /** In place: the exact GELU, x times the normal distribution's share below x. */
  function gelu(x) {
    for (let i = 0; i < x.length; i++) x[i] *= 0.5 * (1 + erf(x[i] * Math.SQRT1_2));
    return x;
  }

  const plus = (x, y) => x.map((value, i) => value + y[i]);

  // ------------------------------------------------------------------ encodings

  /** The PEG: tokens (N, D) as an image, plus a depthwise convolution of that image, weight (D, 1, k, k). */
  function peg(tokens, [H, W], D, weight, bias, padding) {
    const out = tokens.slice(), k = Math.round(Math.sqrt(weight.length / D)), reach = (k - 1) / 2;
    for (let row = 0; row < H; row++)
      for (let column = 0; column < W; column++) {
        const to = (row * W + column) * D;
        for (let i = 0; i < D; i++) out[to + i] += bias[i];
        for (let u = 0; u < k; u++)
          for (let v = 0; v < k; v++) {
            let r = row + u - reach, c = column + v - reach;
            if (padding === "circular") (r = (r + H) % H), (c = (c + W) % W);
            else if (r < 0 || r >= H || c < 0 || c >= W) continue; // zeros beyond the border
            const from = (r * W + c) * D;
            for (let i = 0; i < D; i++) out[to + i] += weight[(i * k + u) * k + v] * tokens[from + i];
          }
      }
    return out;
  }

  /** For each of `size` places: four neighbours among `old` ones and their weights, as PyTorch's bicubic has them. */
  function bicubic(old, size) {
    const near = (t) => (1.25 * t - 2.25) * t * t + 1; // Keys' kernel with a = -0.75, up to 1 away
    const far = (t) => ((-0.75 * t + 3.75) * t - 6) * t + 3; // from 1 to 2 away
    return Array.from({ length: size }, (_, i) => {
      const place = ((i + 0.5) * old) / size - 0.5, first = Math.floor(place), t = place - first;
      const weights = [far(1 + t), near(t), near(1 - t), far(2 - t)];
      return weights.map((weight, j) => [Math.min(Math.max(first - 1 + j, 0), old - 1), weight]);
    });
  }

  /** A table (h * w, D) of a grid (h, w), for the grid (H, W). */
  function resampleTable(table, [h, w], [H, W], D) {
    if (h === H && w === W) return table;
    const rows = bicubic(h, H), columns = bicubic(w, W), out = new Float64Array(H * W * D);
    for (let row = 0; row < H; row++)
      for (let column = 0; column < W; column++)
        for (const [r, a] of rows[row])
          for (const [c, b] of columns[column])
            for (let i = 0; i < D; i++) out[(row * W + column) * D + i] += a * b * table[(r * w + c) * D + i];
    return out;
  }

  /** (N, 2 n): row and column of each token, times n frequencies from 1 down towards 1 / base. */
  function axialAngles([H, W], n, base, [down, across]) {
    const out = new Float64Array(H * W * 2 * n);
    for (let token = 0; token < H * W; token++)
      for (let i = 0; i < n; i++) {
        const frequency = base ** (-i / n);
        out[token * 2 * n + i] = Math.floor(token / W) * down * frequency;
        out[token * 2 * n + n + i] = (token % W) * across * frequency;
      }
    return out;
  }

  /** Distance between neighbouring tokens: 1, or what keeps the trained grid's ends the ends. */
  const steps = (part, trained, grid) => (part.resize === "rescale" ? [0, 1].map((i) => trained[i] / grid[i]) : [1, 1]);

  function sineTable(grid, D, base, step) {
    const n = D / 4, angles = axialAngles(grid, n, base, step), out = new Float64Array(angles.length * 2);
    for (let half = 0; half < angles.length; half += n)
      for (let i = 0; i < n; i++) {
        out[2 * half + i] = Math.sin(angles[half + i]);
        out[2 * half + n + i] = Math.cos(angles[half + i]);
      }
    return out;
  }

  // ------------------------------------------------------------------ the model

  class VisionTransformer {
    /** `config`: ModelConfig and the parts of its encoding; `weights`: name -> Float64Array, PyTorch's names. */
    constructor(config, weights) {
      Object.assign(this, { config, weights, P: config.global_pool === "token" ? 1 : 0, D: config.width });
    }

    /** (C, height, width) in [0, 1] -> (N, D): one linear map of every normalised p x p patch. */
    patchEmbed(image, height, width) {
      const { patch_size: p, mean, std } = this.config, C = mean.length, columns = width / p;
      const patches = new Float64Array(image.length), size = C * p * p;
      for (let c = 0; c < C; c++)
        for (let y = 0; y < height; y++)
          for (let x = 0; x < width; x++) {
            const patch = Math.floor(y / p) * columns + Math.floor(x / p), within = (c * p + (y % p)) * p + (x % p);
            patches[patch * size + within] = (image[(c * height + y) * width + x] - mean[c]) / std[c];
          }
      return linear(patches, this.weights["patch_embed.proj.weight"], this.weights["patch_embed.proj.bias"]);
    }

    /** (T, D) -> (T, D): what the encoding does at a position, -1 before block 0, i after block i. */
    encode(position, x, grid) {
      const { D, P, weights, config } = this, trained = config.grid;
      const add = (prefix, table) => {
        const whole = new Float64Array(x.length);
        whole.set(prefix), whole.set(table, P * D);
        return plus(x, whole);
      };
      for (const part of config.encoding)
        if (part.kind === "peg" && part.positions.includes(position)) {
          const layer = `encoding.peg.${position}.proj`, patches = x.subarray(P * D);
          const seen = peg(patches, grid, D, weights[`${layer}.weight`], weights[`${layer}.bias`], part.padding);
          x = x.slice();
          x.set(seen, P * D);
        } else if (position === -1 && part.kind === "learned") {
          const table = weights.pos_embed; // the prefix tokens' entries stay as they are
          x = add(table.subarray(0, P * D), resampleTable(table.subarray(P * D), trained, grid, D));
        } else if (position === -1 && part.kind === "sine")
          x = add([], sineTable(grid, D, part.temperature, steps(part, trained, grid)));
      return x;
    }

    /** In place, rotary: half of each head turns with the row, half with the column; no prefix turns. */
    rotate(vectors, grid, d) {
      const part = this.config.encoding.find(({ kind }) => kind === "rotary");
      if (!part) return vectors;
      const angles = axialAngles(grid, d / 4, part.theta, steps(part, this.config.grid, grid));
      for (let i = 0; i < angles.length; i++) {
        const token = this.P + Math.floor(i / (d / 2)), a = token * d + (i % (d / 2)), b = a + d / 2;
        const cos = Math.cos(angles[i]), sin = Math.sin(angles[i]);
        [vectors[a], vectors[b]] = [vectors[a] * cos - vectors[b] * sin, vectors[a] * sin + vectors[b] * cos];
      }
      return vectors;
    }

    /** (T, D) normed -> (T, D), and the weights (h, T, T), or of the first token alone, (h, 1, T). */
    attention(block, x, grid, all) {
      const { D, weights, config: { heads: h } } = this, d = D / h, T = x.length / D, layer = `blocks.${block}.attn`;
      const qkv = linear(x, weights[`${layer}.qkv.weight`], weights[`${layer}.qkv.bias`]);
      const out = new Float64Array(T * D), kept = all ? T : 1, seen = new Float64Array(h * kept * T);
      const read = new Float64Array(T);
      for (let head = 0; head < h; head++) {
        const [q, k, v] = [0, 1, 2].map((which) => {
          const part = new Float64Array(T * d);
          for (let t = 0; t < T; t++)
            for (let i = 0; i < d; i++) {
              const value = qkv[t * 3 * D + which * D + head * d + i];
              part[which === 2 ? i * T + t : t * d + i] = value; // values stand transposed, (d, T)
            }
          return part;
        });
        this.rotate(q, grid, d), this.rotate(k, grid, d);
        for (let t = 0; t < T; t++) {
          products(q, t * d, k, 0, T, d, read, 0);
          for (let i = 0; i < T; i++) read[i] /= Math.sqrt(d);
          softmax(read, 0, T);
          if (t < kept) seen.set(read, (head * kept + t) * T);
          products(read, 0, v, 0, d, T, out, t * D + head * d);
        }
      }
      return [linear(out, weights[`${layer}.proj.weight`], weights[`${layer}.proj.bias`]), seen];
    }

    /** An image (C, height, width) in [0, 1] -> all that the pages show of a forward pass:
     * grid; maps, patch tokens (N, D) before block 0 and after each block and its PEG; added (N, D), by the encoding
     * before block 0 and after it; attention of each block; features (D) that the head reads; logits (K). */
    forward(image, height, width, { all = false } = {}) {
      const { D, P, weights: w, config } = this, grid = [height / config.patch_size, width / config.patch_size];
      const patches = this.patchEmbed(image, height, width), bare = new Float64Array(P * D + patches.length);
      if (P) bare.set(w.cls_token);
      bare.set(patches, P * D);
      let x = this.encode(-1, bare, grid), added = plus(x, bare.map((value) => -value));
      const maps = [x.slice(P * D)], attention = [];
      for (let i = 0; i < config.depth; i++) {
        const [norm1, norm2, fc1, fc2] = ["norm1", "norm2", "mlp.fc1", "mlp.fc2"].map((name) =>
          ["weight", "bias"].map((kind) => w[`blocks.${i}.${name}.${kind}`]));
        const [read, seen] = this.attention(i, layerNorm(x, ...norm1), grid, all);
        x = plus(x, read);
        x = plus(x, linear(gelu(linear(layerNorm(x, ...norm2), ...fc1)), ...fc2));
        const after = this.encode(i, x, grid);
        if (i === 0) added = plus(added, after.map((value, j) => value - x[j]));
        x = after;
        maps.push(x.slice(P * D)), attention.push(seen);
      }
      x = layerNorm(x, w["norm.weight"], w["norm.bias"]);
      const features = x.slice(0, D), T = x.length / D;
      if (!P) features.fill(0); // the mean of all tokens in place of the class token
      for (let j = 0; !P && j < x.length; j++) features[j % D] += x[j] / T;
      const logits = linear(features, w["head.weight"], w["head.bias"]);
      return { grid, maps, added: added.slice(P * D), attention, features, logits };
    }
  }

  return { VisionTransformer, softmax, erf, peg };
}
