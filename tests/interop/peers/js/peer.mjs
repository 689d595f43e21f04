// js-libp2p: node peer.mjs [relay|relayed]. Driven as tests/interop/peers/control.py says; the traffic is that of traffic.py.

import { randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { identify } from '@libp2p/identify'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const ECHO = '/x/interop/echo/1'
const AFTER_END = '/x/interop/after-end/1'
const ABORT = '/x/interop/abort/1'
const ABORT_AFTER = 100_000
const BLOCK = 262_139
const MANY = { maxInboundStreams: 1024, maxOutboundStreams: 1024 }

const role = process.argv[2] // 'relay': a relay without limits; 'relayed': can only be reached through one

const relay = role === 'relay'
  ? { relay: circuitRelayServer({ reservations: { applyDefaultLimit: false } }) }
  : {}

const node = await createLibp2p({
  addresses: { listen: role === 'relayed' ? [] : ['/ip4/127.0.0.1/tcp/0'] },
  transports: role === 'relayed' ? [tcp(), circuitRelayTransport()] : [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  connectionManager: { inboundConnectionThreshold: 1000 }, // per second and host; 5 by default, and tests are faster
  // By default one identify stream at a time: a test's own would be reset while the one of every new connection runs.
  services: { identify: identify({ maxInboundStreams: 8, maxOutboundStreams: 8 }), ping: ping(), ...relay }
})

async function send (stream, data) {
  if (!stream.send(data)) await stream.onDrain()
}

// Not `for await (const data of stream)`: that ends with the remote's FIN even when data before it is still buffered.
async function * received (stream) {
  const queue = []
  let ended = stream.readableEnded
  let failure = null
  let wake = () => {}
  const onMessage = ({ data }) => { queue.push(data); wake() }
  const onEnd = () => { ended = true; wake() }
  const onClose = ({ error }) => { failure = error; wake() }
  stream.addEventListener('message', onMessage)
  stream.addEventListener('end', onEnd)
  stream.addEventListener('close', onClose)
  try {
    while (true) {
      while (queue.length > 0) yield queue.shift()
      if (failure != null) throw failure
      if (ended) return
      await new Promise((resolve) => { wake = resolve })
    }
  } finally {
    stream.removeEventListener('message', onMessage)
    stream.removeEventListener('end', onEnd)
    stream.removeEventListener('close', onClose)
  }
}

let resets = 0
let onReset = []

await node.handle(ECHO, async (stream) => {
  try {
    for await (const data of received(stream)) await send(stream, data)
    await stream.close()
  } catch {
    resets += 1
    for (const wake of onReset) wake()
    onReset = []
  }
}, MANY)

await node.handle(AFTER_END, async (stream) => {
  const kept = []
  for await (const data of received(stream)) kept.push(data)
  for (const data of kept) await send(stream, data)
  await stream.close()
}, MANY)

await node.handle(ABORT, async (stream) => {
  let got = 0
  for await (const data of received(stream)) {
    got += data.byteLength
    await send(stream, data)
    if (got >= ABORT_AFTER) break
  }
  stream.abort(new Error('on purpose'))
}, MANY)

async function open (peer, protocol) {
  const connection = node.getConnections().find((c) => c.remotePeer.toString() === peer)
  if (connection == null) throw new Error(`not connected to ${peer}`)
  return connection.newStream(protocol, MANY)
}

async function exchange (stream, size, halfClose) {
  const block = randomBytes(Math.min(size, BLOCK))
  const sending = (async () => {
    for (let left = size; left > 0; left -= Math.min(left, BLOCK)) await send(stream, block.subarray(0, left))
    if (halfClose) await stream.close()
  })()
  sending.catch(() => {}) // awaited below; reading may fail first
  let got = 0
  for await (const list of received(stream)) {
    const data = list.subarray()
    for (let pos = 0; pos < data.byteLength;) {
      const at = got % block.byteLength
      const n = Math.min(data.byteLength - pos, block.byteLength - at)
      if (block.compare(data, pos, pos + n, at, at + n) !== 0) throw new Error(`wrong bytes from ${got}`)
      pos += n
      got += n
    }
    if (!halfClose && got >= size) break
  }
  await sending
  if (got !== size) throw new Error(`${got} of ${size} bytes came back`)
}

const commands = {
  async connect ({ addr }) {
    return (await node.dial(multiaddr(addr))).remotePeer.toString()
  },
  async reserve ({ relay }) {
    await node.components.transportManager.listen([multiaddr(`${relay}/p2p-circuit`)])
    while (true) {
      const addr = node.getMultiaddrs().find((a) => a.toString().includes('/p2p-circuit'))
      if (addr != null) return addr.toString()
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
  },
  async echo ({ peer, size, streams }) {
    const all = await Promise.all(Array.from({ length: streams }, async () => open(peer, ECHO)))
    await Promise.all(all.map(async (stream) => exchange(stream, size, true)))
  },
  async after_end ({ peer, size }) {
    await exchange(await open(peer, AFTER_END), size, true)
  },
  async reset ({ peer }) {
    const stream = await open(peer, ECHO)
    await exchange(stream, ABORT_AFTER, false)
    stream.abort(new Error('on purpose'))
  },
  async aborted ({ peer }) {
    const stream = await open(peer, ABORT)
    try {
      await exchange(stream, 100 * ABORT_AFTER, false)
    } catch (error) {
      if (stream.status !== 'reset') throw error
      return error.name
    }
    throw new Error('the peer did not reset the stream')
  },
  async identify ({ peer }) {
    const connection = node.getConnections().find((c) => c.remotePeer.toString() === peer)
    const { agentVersion, protocols } = await node.services.identify.identify(connection)
    return { agent: agentVersion, protocols }
  },
  async ping ({ peer }) {
    const connection = node.getConnections().find((c) => c.remotePeer.toString() === peer)
    await node.services.ping.ping(connection.remotePeer)
  },
  async resets ({ seen }) {
    while (resets <= seen) await new Promise((resolve) => onReset.push(resolve))
    return resets
  }
}

function say (message) {
  process.stdout.write(JSON.stringify(message) + '\n')
}

const { version } = JSON.parse(readFileSync(new URL('node_modules/libp2p/package.json', import.meta.url)))
say({
  peer: node.peerId.toString(),
  addr: node.getMultiaddrs()[0]?.toString() ?? '',
  version: `js-libp2p ${version}, Node.js ${process.versions.node}`
})

for await (const line of createInterface({ input: process.stdin })) {
  const { id, do: name, ...args } = JSON.parse(line)
  commands[name](args).then(
    (result) => say({ id, result: result ?? null }),
    (error) => say({ id, error: `${error.name}: ${error.message}` })
  )
}
process.exit(0)
