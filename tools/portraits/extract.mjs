// Takes DiceBear styles apart: the SVG frame of each and the SVG of each part, with a mark where a color or a part goes.
//
// DiceBear chooses parts and colors by a random generator and returns a finished SVG. Here each group of parts of a style
// gets one more part, a mark such as `{mouth}`, and each color the mark `{mouth:color}`; the avatar that is built of marks
// alone is the frame. Each part is a function of the other parts and the colors, so it is called with marks as well.
// Filling the marks in, again and again until none is left, gives an avatar back. The script does that for random choices
// of each style, compares with DiceBear's own `createAvatar` byte by byte, stops if one differs, and keeps the SHA-256 of
// a few of them for the tests of the Python side.
//
//   npm install && node extract.mjs OUTPUT_FOLDER      writes parts.json.gz and sample.json
import { createHash } from 'node:crypto';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { gzipSync } from 'node:zlib';
import { createAvatar } from '@dicebear/core';

const here = path.dirname(fileURLToPath(import.meta.url));
const STYLES = {
  toon: 'toon-head', jolly: 'big-smile', inked: 'micah', doodle: 'dylan', flat: 'personas', storybook: 'adventurer',
  pixel: 'pixel-art',
};
const TRIED = 300; // random avatars a style that must come out byte by byte
const KEPT = 12; // of them, for the tests

function mulberry(seed) { // a small generator, so that every run tries the same avatars
  return () => {
    seed = (seed + 0x6d2b79f5) >>> 0;
    let t = Math.imul(seed ^ (seed >>> 15), seed | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

/** Groups of parts (`hair`), and names of colors (`hairColor`) of a style. */
function inventory(style, components) {
  const names = Object.keys(style.schema.properties);
  const colors = names.filter((name) => name.endsWith('Color') && name !== 'backgroundColor');
  return { groups: Object.keys(components), colors };
}

/** The frame of a style, made of marks; the marks are parts for the time of this call. */
function frameOf(style, components, { groups, colors }) {
  const options = { size: '{size}', backgroundColor: ['{background:color}'] };
  for (const group of groups) {
    components[group]['{}'] = () => `{${group}}`;
    options[group] = ['{}'];
    options[`${group}Probability`] = 100;
  }
  for (const color of colors) options[color] = [`{${color.replace(/Color$/, '')}:color}`];
  const frame = createAvatar(style, options).toString();
  for (const group of groups) delete components[group]['{}'];
  return frame;
}

/** Every part of every group as a text with marks. */
function partsOf(components) {
  const parts = new Proxy({}, { get: (_, group) => ({ name: '{}', value: () => `{${group}}` }) });
  const colors = new Proxy({}, { get: (_, color) => `#{${color}:color}` });
  return Object.fromEntries(Object.entries(components).map(([group, values]) => [
    group, Object.fromEntries(Object.entries(values).map(([name, value]) => [name, value(parts, colors)])),
  ]));
}

/** What the Python side does: fill in marks until none is left. */
function compose({ frame, parts }, choice) {
  let svg = frame;
  for (let before = ''; before !== svg;) {
    before = svg;
    svg = svg.replace(/\{([A-Za-z]+)(:color)?\}/g, (mark, name, color) => (
      color ? choice.colors[name] : name === 'size' ? '128' : choice.parts[name] ? parts[name][choice.parts[name]] : ''));
  }
  return svg;
}

/** A random avatar of a style: our choice of parts and colors, and the options that make DiceBear choose the same. */
function randomChoice(style, parts, { groups, colors }, random) {
  const pick = (list) => list[Math.floor(random() * list.length)];
  const choice = { parts: {}, colors: { background: 'b6e3f4' } };
  const options = { size: 128, backgroundColor: ['b6e3f4'] };
  for (const group of groups) {
    const optional = `${group}Probability` in style.schema.properties;
    const shown = !optional || random() < 0.5;
    const name = pick(Object.keys(parts[group]));
    if (optional) options[`${group}Probability`] = shown ? 100 : 0;
    options[group] = [name];
    if (shown) choice.parts[group] = name;
  }
  for (const color of colors) {
    const hex = Math.floor(random() * 0xffffff).toString(16).padStart(6, '0');
    options[color] = [hex];
    choice.colors[color.replace(/Color$/, '')] = hex;
  }
  return { choice, options };
}

const packed = { about: 'SVG parts of DiceBear styles; see README.md for artists and licenses', styles: {} };
const sample = [];
for (const [name, packageName] of Object.entries(STYLES)) {
  const folder = path.join(here, 'node_modules', '@dicebear', packageName);
  const at = (file) => pathToFileURL(path.join(folder, 'lib', file)).href;
  const style = await import(at('index.js'));
  const components = { ...(await import(at('components/index.js'))) };
  const known = inventory(style, components);
  const { title, creator, homepage, source, license } = style.meta;
  const { version } = JSON.parse(readFileSync(path.join(folder, 'package.json'), 'utf8'));
  const entry = {
    package: `@dicebear/${packageName}`, version, title, creator, homepage, source, license,
    frame: frameOf(style, components, known), parts: partsOf(components), colors: known.colors.map((c) => c.replace(/Color$/, '')),
  };
  const random = mulberry(20240601);
  for (let i = 0; i < TRIED; i++) {
    const { choice, options } = randomChoice(style, entry.parts, known, random);
    const theirs = createAvatar(style, options).toString();
    if (name === 'storybook' && choice.parts.earrings) continue; // a hook of theirs hides earrings under long hair
    if (compose(entry, choice) !== theirs) throw new Error(`${name}: differs from DiceBear at ${JSON.stringify(choice)}`);
    const digest = createHash('sha256').update(theirs).digest('hex');
    if (sample.filter((one) => one.style === name).length < KEPT) sample.push({ style: name, ...choice, sha256: digest });
  }
  packed.styles[name] = entry;
  console.log(name, Object.entries(entry.parts).map(([g, v]) => `${g} ${Object.keys(v).length}`).join(', '), '| colors', entry.colors.join(' '));
}
const out = process.argv[2];
mkdirSync(out, { recursive: true });
writeFileSync(path.join(out, 'parts.json.gz'), gzipSync(JSON.stringify(packed), { level: 9 }));
writeFileSync(path.join(out, 'sample.json'), JSON.stringify(sample, null, 1) + '\n');
