// FlashAttention forward for Hopper (docs/math.md, eq. 5). A block stays on its SM and draws works: tiles of queries,
// CONSUMERS x 64 of one head at a time.
//
//   1. draw     a producer warp draws a work, longest first, and publishes it to the others (hopper_producer.cuh)
//   2. load     it keeps the copy engine busy with q and keys, a second one with values
//   3. score    a consumer warpgroup owns 64 of the queries: their scores, weights and output stand in its registers,
//               and its products are issued when it is its turn (hopper_products.cuh)
//   4. weigh    scores to weights, under products: another consumer's, and its own (hopper_softmax.cuh)
//   5. store    out / sum and lse, under the next work's products (hopper_results.cuh)
//
// hopper_consumer.cuh takes a consumer through 3 to 5, hopper_work.cuh has what the two sides share. What makes it
// fast, in the order of what it gained:
//
//   - turns: only one consumer at a time issues matrix products, so that one's softmax runs under another's products;
//   - a softmax that does not look for the maximum: weights are taken against an old one, and their sum tells whether
//     that was near enough (it nearly always is); no comparisons, no shuffles, no rescaling of the output.
//     Where works are short the first ones are taken against 0;
//   - no branch by thread where a consumer runs on (arrive_if, store_if): else the compiler takes what is the same in all
//     threads for each one's own, and moves q's descriptor to where a product wants it ahead of every product;
//   - little between a softmax and the next turn: steps come in pairs, whose weights are not moved, and where works are
//     short no step asks if it is the last;
//   - no gap between works: the next one's first scores are issued with this one's last output, and stored under. Where
//     works are short, what the output is divided by is worked out ahead of that turn;
//   - longest works first, drawn late, heads in sections that fit L2;
//   - keys from the first to the last where queries end them, and each consumer up to the last tile that it sees;
//   - the first work is found while the kernel ahead still runs, and its q and keys go ahead of all else.
//
// Measured and dropped (docs/log.md): exp2 by polynomial, q in registers, key tiles above 128, four consumers, eviction
// hints, a third stage, pairs of blocks that share keys, half diagonal tiles, stores under a work's second scores, key
// tiles of 80 to 112 at head_dim 192 and 256, one body for all key tiles, first maxima of a quarter of the scores, one
// body for weights and second tries, exponentials in batches of 16, results sent under the next second scores, the first
// tiles brought into L2 while the kernel ahead runs, the next tile's addresses ahead of the vote on a maximum.
//
// Defines: scalar_t (bf16, f16), HEAD_DIM, K_TILE (keys at a time), CONSUMERS, Q_STAGES, HAS_LEFT and HAS_RIGHT
// (window limits), KEYLESS (a tile of queries may see no key), SOFTCAP, SINKS, PACKED_Q, PACKED_KV, PAGE_SIZE (0: not
// paged), BULK_STORE (results leave through shared memory and the copy engine), FOLDED (few causal tiles: a block works
// on one alone, and of a head's queries its consumers take 64 from the front and 64 from the back).
#include "hopper_consumer.cuh"
#include "hopper_producer.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
           const __grid_constant__ TensorMap v, const __grid_constant__ Params p,
           const __grid_constant__ TensorMap out) {  // out: where BULK_STORE
  extern __shared__ __align__(1024) u8 memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) s.init();
  if (threadIdx.x == 32) prefetch(q), prefetch(k), prefetch(v);
  __syncthreads();
  grid_launch_dependents();
  if (threadIdx.x < 128) {
    shrink_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x < 32) KeyProducer(p, s, q, k).run();
    else if (threadIdx.x < 64) ValueProducer(p, s, v).run();
  } else {
    grow_registers<CONSUMER_REGISTERS>();
    Consumer(p, s, out).run();
  }
}
