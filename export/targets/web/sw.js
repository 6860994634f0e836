// Keeps the site for use without a network, and isolates its pages, which threads need. Everything is fetched from the
// site itself; site.json, written at export, names its files.

const STATE = "@STATE@"; // of the files, written at export: another state is another worker, with a store of its own

const worker = /** @type {any} */ (self);
const scope = new URL("./", location.href);
const store = `avsep ${scope.pathname} ${STATE}`;

/** @param {Response} answer */
function isolated(answer) {
  if (!answer.ok || answer.type === "opaque") return answer;
  const headers = new Headers(answer.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  headers.set("Cross-Origin-Resource-Policy", "same-origin");
  return new Response(answer.body, { status: answer.status, statusText: answer.statusText, headers });
}

worker.addEventListener("install", (/** @type {any} */ event) => {
  const fill = async () => {
    const answer = await fetch("site.json", { cache: "no-store" });
    if (!answer.ok) throw new Error("site.json cannot be loaded");
    const { files } = /** @type {{ files: string[] }} */ (await answer.json());
    const cache = await caches.open(store);
    await cache.addAll(["./", ...files].map((name) => new Request(name, { cache: "no-cache" })));
    await worker.skipWaiting();
  };
  event.waitUntil(fill());
});

worker.addEventListener("activate", (/** @type {any} */ event) => {
  const tidy = async () => {
    for (const name of await caches.keys()) {
      if (name.startsWith(`avsep ${scope.pathname} `) && name !== store) await caches.delete(name);
    }
    await worker.clients.claim();
  };
  event.waitUntil(tidy());
});

worker.addEventListener("fetch", (/** @type {any} */ event) => {
  const { request } = event;
  if (request.method !== "GET" || new URL(request.url).origin !== location.origin) return;
  const answer = async () => {
    const cache = await caches.open(store);
    const kept = await cache.match(request, { ignoreSearch: true });
    if (kept) return isolated(kept);
    const fresh = await fetch(request);
    // a build that site.json does not name is kept once a browser has a use for it
    if (fresh.ok && request.url.startsWith(new URL("ort/", scope).href)) await cache.put(request, fresh.clone());
    return isolated(fresh);
  };
  event.respondWith(answer());
});
