// What the official client of Node sees of a server: node openai.mjs ADDRESS KEY
// Prints one JSON object: the name of each check, and what went wrong in it or null.

import assert from "node:assert/strict";
import OpenAI, { AuthenticationError, BadRequestError, NotFoundError } from "openai";

const [address, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey, maxRetries: 0 });
const messages = [
  { role: "system", content: "Be brief." },
  { role: "user", content: "Hello" },
];
const chat = { model: "tiny", messages, max_completion_tokens: 12 };
const city = {
  type: "object",
  properties: { city: { enum: ["Rome", "Paris"] } },
  required: ["city"],
  additionalProperties: false,
};
const tools = ["weather", "time"].map((name) => ({ type: "function", function: { name, parameters: city } }));
const plain = { enable_thinking: false }; // beside OpenAI's own parameters

const said = (message) => (message.reasoning_content ?? "") + (message.content ?? "");

const checks = {
  async models() {
    const found = [];
    for await (const model of client.models.list()) found.push(model.id);
    assert.deepEqual(found, ["tiny"]);
    assert.equal((await client.models.retrieve("tiny")).object, "model");
  },

  async chat() {
    const { data, request_id } = await client.chat.completions.create(chat).withResponse();
    assert.equal(data.object, "chat.completion");
    assert.equal(data.choices[0].message.role, "assistant");
    assert.equal(data.choices[0].finish_reason, "length");
    assert.ok(said(data.choices[0].message));
    assert.equal(data.usage.completion_tokens, 12);
    assert.equal(data.usage.total_tokens, data.usage.prompt_tokens + 12);
    assert.ok(request_id);
  },

  async "streamed chat"() {
    const whole = await client.chat.completions.create(chat);
    const stream = await client.chat.completions.create({
      ...chat,
      stream: true,
      stream_options: { include_usage: true },
    });
    let text = "";
    let usage = null;
    const ends = [];
    for await (const piece of stream) {
      assert.equal(usage, null, "usage comes last");
      usage = piece.usage ?? null;
      for (const choice of piece.choices) {
        text += said(choice.delta);
        if (choice.finish_reason) ends.push(choice.finish_reason);
      }
    }
    assert.equal(text, said(whole.choices[0].message));
    assert.deepEqual(ends, ["length"]);
    assert.equal(usage.completion_tokens, 12);
    assert.equal(usage.prompt_tokens, whole.usage.prompt_tokens);
  },

  async "forced call"() {
    const asked = {
      ...chat,
      ...plain,
      tools,
      tool_choice: { type: "function", function: { name: "time" } },
      parallel_tool_calls: false,
      max_completion_tokens: 300,
    };
    const whole = (await client.chat.completions.create(asked)).choices[0].message;
    const streamed = await client.chat.completions.stream(asked).finalMessage();
    for (const message of [whole, streamed]) {
      assert.equal(message.tool_calls.length, 1);
      const [call] = message.tool_calls;
      assert.equal(call.type, "function");
      assert.ok(call.id);
      assert.equal(call.function.name, "time");
      assert.ok(["Rome", "Paris"].includes(JSON.parse(call.function.arguments).city));
    }
    const answered = await client.chat.completions.create({
      ...chat,
      tools,
      messages: [...messages, whole, { role: "tool", tool_call_id: whole.tool_calls[0].id, content: "noon" }],
    });
    assert.equal(answered.choices[0].message.role, "assistant");
  },

  async "json schema"() {
    const reply = await client.chat.completions.parse({
      ...chat,
      ...plain,
      response_format: { type: "json_schema", json_schema: { name: "place", schema: city, strict: true } },
      max_completion_tokens: 300,
    });
    assert.equal(reply.choices[0].finish_reason, "stop");
    assert.ok(["Rome", "Paris"].includes(JSON.parse(reply.choices[0].message.content).city));
  },

  async completions() {
    const asked = { model: "tiny", prompt: "The sun", max_tokens: 8 };
    const whole = await client.completions.create({ ...asked, logprobs: 2 });
    assert.equal(whole.object, "text_completion");
    assert.equal(whole.choices[0].logprobs.token_logprobs.length, 8);
    let text = "";
    for await (const piece of await client.completions.create({ ...asked, stream: true })) {
      text += piece.choices[0].text;
    }
    assert.equal(text, whole.choices[0].text);
  },

  async "unknown model"() {
    await assert.rejects(client.chat.completions.create({ ...chat, model: "tine" }), (error) => {
      assert.ok(error instanceof NotFoundError);
      assert.equal(error.code, "model_not_found");
      return error.status === 404 && error.param === "model";
    });
    await assert.rejects(client.models.retrieve("tine"), NotFoundError);
  },

  async "bad field"() {
    const wrong = { temperature: 3, temprature: 1, top_p: "high" };
    for (const [name, value] of Object.entries(wrong)) {
      await assert.rejects(client.chat.completions.create({ ...chat, [name]: value }), (error) => {
        assert.ok(error instanceof BadRequestError, `${name}: ${error}`);
        assert.equal(error.type, "invalid_request_error");
        return error.param === name && error.message.includes(name);
      });
    }
  },

  async "no key"() {
    const stranger = new OpenAI({ baseURL: `${address}/v1`, apiKey: "none", maxRetries: 0 });
    await assert.rejects(stranger.models.list(), AuthenticationError);
    await assert.rejects(stranger.chat.completions.create(chat), (error) => {
      assert.ok(error instanceof AuthenticationError);
      return error.code === "invalid_api_key";
    });
  },
};

const found = {};
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    found[name] = null;
  } catch (error) {
    found[name] = error.stack ?? String(error);
  }
}
console.log(JSON.stringify(found));
