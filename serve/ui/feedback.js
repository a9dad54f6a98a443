// Sends what a person says of replies, if the person has agreed.

import { at, say, value } from "/ui/page.js";
import { call } from "/ui/stream.js";

export async function tell(row) {
  if (!value("consent")) {
    say("agree first, under Feedback at the side, that it is kept");
    at("side").classList.add("open");
    at("menu").setAttribute("aria-expanded", "true");
    at("consent").focus();
    return false;
  }
  try {
    await call("/v1/feedback", { consent: true, ...row }, value("key"));
    say("");
    return true;
  } catch (error) {
    say(error.message);
    return false;
  }
}
