// An exported explainer in the browser: pixels in, scores and a map out. Nothing is sent anywhere.

import * as ort from "onnxruntime-web";

ort.env.wasm.numThreads = 1; // more need headers that a static page cannot set

// How 8-bit colours become the model's input, per channel.
export const PREPROCESSING = {
  "x/127.5 − 1": () => ({ factor: 1 / 127.5, offset: -1 }),
  "x/255": () => ({ factor: 1 / 255, offset: 0 }),
  "ImageNet": (c) => {
    const mean = [0.485, 0.456, 0.406][c], sd = [0.229, 0.224, 0.225][c];
    return { factor: 1 / (255 * sd), offset: -mean / sd };
  },
};

export class Explainer {
  /** `model`: a URL or the file's bytes; `weights`: {path, data} where they lie in another file. */
  static async load(model, weights) {
    const options = weights ? { externalData: [weights] } : {};
    const session = await ort.InferenceSession.create(model, options);
    const explainer = new Explainer();
    explainer.session = session;
    explainer.image = session.inputNames.find((name) => name !== "target");
    const shape = session.inputMetadata.find((v) => v.name === explainer.image).shape;
    explainer.channelsLast = shape.at(-1) <= 3;
    const [channels, height, width] = explainer.channelsLast
      ? [shape[3], shape[1], shape[2]] : shape.slice(1);
    return Object.assign(explainer, { channels, height, width });
  }

  /** `pixels`: RGBA, row by row, of the model's size; `target`: a class, or −1 for the predicted one. */
  async explain(pixels, target, preprocessing) {
    const { channels, height, width, channelsLast } = this;
    const area = height * width, data = new Float32Array(channels * area);
    const at = (c, i) => (channelsLast ? i * channels + c : c * area + i);
    for (let c = 0; c < channels; c++) {
      const { factor, offset } = preprocessing(c);
      for (let i = 0; i < area; i++) data[at(c, i)] = pixels[4 * i + c] * factor + offset;
    }
    const shape = channelsLast ? [1, height, width, channels] : [1, channels, height, width];
    const results = await this.session.run({
      [this.image]: new ort.Tensor("float32", data, shape),
      target: new ort.Tensor("int64", [BigInt(target)], [1]),
    });
    const name = this.session.outputNames.find((v) => v !== "attribution");
    const attribution = results.attribution.data, map = new Float32Array(area);
    for (let c = 0; c < channels; c++)
      for (let i = 0; i < area; i++) map[i] += attribution[at(c, i)];
    return { scores: results[name].data, attribution, map };
  }
}

/** The map as RGBA: capped at its 0.5th and 99.5th percentile, blue – white – red around 0. */
export function colours(map) {
  const sorted = Float32Array.from(map).sort();
  const percentile = (p) => {
    const h = ((sorted.length - 1) * p) / 100, low = Math.floor(h);
    return sorted[low] + (sorted[Math.ceil(h)] - sorted[low]) * (h - low);
  };
  const low = percentile(0.5), high = percentile(99.5);
  const capped = map.map((v) => (v > high ? high : v < low ? (low > 0 ? 0 : low) : v));
  const largest = capped.reduce((m, v) => Math.max(m, Math.abs(v)), 0) || 1;
  const rgba = new Uint8ClampedArray(4 * map.length);
  capped.forEach((v, i) => {
    const t = Math.abs(v) / largest, [r, g, b] = v > 0 ? [178, 24, 43] : [33, 102, 172];
    rgba.set([255 + (r - 255) * t, 255 + (g - 255) * t, 255 + (b - 255) * t, 255], 4 * i);
  });
  return rgba;
}
