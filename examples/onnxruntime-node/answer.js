// Answers token ids with a file that `offramp export` wrote; nothing of offramp is installed here.
//   npm install onnxruntime-node
//   node answer.js model.onnx '[[101, 2023, 102], [101, 7592, 102]]' [bar]
// A file whose exits have bars of their own takes them as 0.9,0.8,NaN; one stands for all.
// Rows of one call have the same length here; pad them, with zeros in the mask, where they have not.
const ort = require("onnxruntime-node");

async function main([file, text, bar]) {
  const rows = JSON.parse(text);
  const shape = [rows.length, rows[0].length];
  const whole = (values) => new ort.Tensor("int64", BigInt64Array.from(values.map(BigInt)), shape);
  const ids = rows.flat();
  const bars = (bar ?? "NaN").split(",").map(Number);
  const session = await ort.InferenceSession.create(file);
  const feeds = {
    input_ids: whole(ids),
    token_type_ids: whole(ids.map(() => 0)),
    attention_mask: whole(ids.map(() => 1)),
    bar: new ort.Tensor("float32", bars.slice(0, 1), []),
    bars: new ort.Tensor("float32", bars, [bars.length]),
  };
  for (const name of Object.keys(feeds)) {
    if (!session.inputNames.includes(name)) delete feeds[name];
  }
  const { answer, scores, exit_layer } = await session.run(feeds);
  console.log(
    JSON.stringify({
      answer: Array.from(answer.data, Number),
      scores: Array.from(scores.data),
      exit_layer: Array.from(exit_layer.data, Number),
    }),
  );
}

main(process.argv.slice(2));
