// How humming's kernel ends where its outputs are those of a gate: appended to the kernel's own source.
//
// Outputs alternate, eight of the gate and eight that it multiplies. A warp computes sixteen of them at a
// time, and each of its threads holds those of one row of eight and of the row eight further: so a thread
// has both factors, and half as many outputs are stored.
//
// Where a tile is split along the inputs, each part adds its sums to those of the tile in memory. The part
// that is ready last has the sums of all, computes the gate, and leaves zeros for the next product. The memory
// is that of "sorted_ids", and "top_k" is the number of tiles that it has room for: only products of experts
// have use for these two.

template <class Mma, class Arithmetic, class... Options>
class EpiloguePipeline<KernelContext<Options...>, Mma, Arithmetic>
    : F16Conversion<typename KernelContext<Options...>::ElementC> {
  using Context = KernelContext<Options...>;
  using Storage = typename Context::SharedStorage;
  using Block = typename Context::BlockShape;
  using Warp = typename Context::WarpShape;
  using Sums = typename Mma::CRegistersArrayType;
  using Two = typename F16Conversion<typename Context::ElementC>::scalar_t2;
  static constexpr uint32_t kSixteens = Warp::N / 16, kEights = Warp::M / 8;
  static constexpr uint32_t kColumns = 64;  // outputs that lie together in shared memory, a token after another
  static constexpr uint32_t kWarps = kColumns / (Warp::N / 2);  // that compute so many
  static constexpr bool kAlone = Storage::kUseWarpgroupOutput;  // each four warps end on their own
  static constexpr uint32_t kThreads = kAlone ? 128 : Context::kNumMathThreads;  // that end together
  static constexpr uint32_t kFours = sizeof(Sums) / 32;  // of a thread in memory: four times two sums each
  static constexpr uint32_t kStride = Block::M * Block::N / 8 / kFours;  // threads that hold sums of a tile
  static_assert(sizeof(Sums) == kSixteens * kEights * 2 * sizeof(float2));
  static_assert(Warp::N == 32 && Warp::M == Block::M && !Context::kOutputChunkRows);
  static_assert(Context::kUseTmaC && Context::kUseWarpSpec);
  static_assert(Context::kMultiCastSizeA * Context::kMultiCastSizeB == 1);
  static_assert(!kAlone || Block::K == Warp::K);

public:
  Context &context;
  Arithmetic &arith;

  CUDA_INLINE EpiloguePipeline(Context &context, Arithmetic &arith)
      : context(context), arith(arith), reducer(context) {
    context.sync_math_threads();
  }

  CUDA_INLINE void seek(uint32_t, uint32_t m_block, uint32_t n_block, uint32_t, uint32_t) {
    row = m_block * Block::M;
    columns = n_block * (Block::N / 2 / kColumns);
  }

  CUDA_INLINE void set_streamk_state(uint32_t parts, uint32_t, uint32_t tile) {
    this->parts = parts;
    this->tile = tile;
    lock = context.params.locks + tile * Storage::kNumStreamKLocksPerTile + (kAlone ? context.math_thread_id() / 128 : 0);
  }

  CUDA_INLINE void call(uint32_t *registers) {
    float2 *sums = reinterpret_cast<float2 *>(registers);
    // what was stored before may still be read
    if constexpr (Context::kSmemReuseMode == SmemReuseMode::NONE) tma_wait_store_group<0, true>();
    if constexpr (Block::K > Warp::K || Context::kSmemReuseMode != SmemReuseMode::NONE) context.sync_math_threads();
    else sync();
    if constexpr (Block::K > Warp::K) reducer.reduce(registers);
    if (parts == 1 || collect(sums)) {
      if (context.k_warp_id() == 0) write(sums);
      tma_fence_async_shared();
      sync();
      store();
    }
    if constexpr (kAlone && Context::kSmemReuseMode != SmemReuseMode::NONE) context.sync_math_threads();
  }

private:
  EpilogueSmemReducer<Context, Mma> reducer;
  uint32_t row = 0, columns = 0, parts = 1, tile = 0;
  int32_t *lock = nullptr;

  CUDA_INLINE uint32_t barrier() { return kAlone ? 3 + context.math_thread_id() / 128 : 1; }

  CUDA_INLINE void sync() { sync_part_threads<kThreads, Context::kNumThreads>(barrier()); }

  // Returns whether this part is the last one that is ready: then it has the sums of all.
  CUDA_INLINE bool collect(float2 *sums) {
    if (tile >= context.params.top_k) __trap();
    uint4 *place = reinterpret_cast<uint4 *>(const_cast<uint32_t *>(context.params.sorted_ids_ptr));
    place += tile * (Block::M * Block::N / 8) + context.math_thread_id();
    if (context.k_warp_id() == 0) {
      PRAGMA_UNROLL
      for (uint32_t i = 0; i < kFours; i++) {
        uint4 four;
        Two *twos = reinterpret_cast<Two *>(&four);
        PRAGMA_UNROLL
        for (uint32_t j = 0; j < 4; j++) twos[j] = this->float22num2(sums[i * 4 + j]);
        add(place + i * kStride, four);
      }
    }
    sync();
    bool last = false;
    if (context.math_thread_id() % kThreads == 0) {
      asm volatile("fence.acq_rel.gpu;\n" ::: "memory");
      last = atomicAdd(lock, 1) == int32_t(parts) - 1;
      asm volatile("fence.acq_rel.gpu;\n" ::: "memory");
      if (last) __stcg(lock, 0);
    }
    if (!any(last)) return false;
    if (context.k_warp_id() != 0) return true;
    PRAGMA_UNROLL
    for (uint32_t i = 0; i < kFours; i++) {
      uint4 four = __ldcg(place + i * kStride);
      PRAGMA_UNROLL
      for (uint32_t j = 0; j < 4; j++) sums[i * 4 + j] = this->num22float2(reinterpret_cast<Two *>(&four)[j]);
    }
    PRAGMA_UNROLL
    for (uint32_t i = 0; i < kFours; i++) __stcg(place + i * kStride, uint4{0, 0, 0, 0});
    return true;
  }

  CUDA_INLINE void add(uint4 *place, uint4 four) {
    if constexpr (std::is_same<typename Context::ElementC, Float16>::value) {
      asm volatile("red.relaxed.gpu.global.add.noftz.v4.f16x2 [%0], {%1, %2, %3, %4};\n"
                   :: "l"(place), "r"(four.x), "r"(four.y), "r"(four.z), "r"(four.w) : "memory");
    } else {
      asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};\n"
                   :: "l"(place), "r"(four.x), "r"(four.y), "r"(four.z), "r"(four.w) : "memory");
    }
  }

  CUDA_INLINE bool any(bool one) {
    uint32_t result;
    asm volatile(
        "{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nbar.red.or.pred q, %2, %3, p;\nselp.u32 %0, 1, 0, q;\n}\n"
        : "=r"(result) : "r"(uint32_t(one)), "r"(barrier()), "n"(kThreads) : "memory");
    return result;
  }

  CUDA_INLINE void write(float2 *sums) {
    Two *stored = reinterpret_cast<Two *>(context.smem.reduce);
    const uint32_t lane = context.lane_id(), warp = context.n_warp_id();
    const uint32_t token = lane % 4 * 2 + lane % 8 / 4;  // of eight, once sums are exchanged
    const uint32_t swizzle = (token + offsetof(Storage, reduce) / 128) % 8;
    stored += warp / kWarps * (Storage::kOutputRows * kColumns / 2) + token * (kColumns / 2) + lane / 8;
    PRAGMA_UNROLL
    for (uint32_t sixteen = 0; sixteen < kSixteens; sixteen++) {
      const uint32_t place = (warp % kWarps * kSixteens + sixteen ^ swizzle) * 4;
      PRAGMA_UNROLL
      for (uint32_t eight = 0; eight < kEights; eight++) {
        float2 *both = sums + (sixteen * kEights + eight) * 2;
        const Two gate = finish(both[0], eight, sixteen * 2), up = finish(both[1], eight, sixteen * 2 + 1);
        stored[eight * 8 * (kColumns / 2) + place] = __hmul2(silu(gate), up);
      }
    }
  }

  // Returns two outputs of one token.
  CUDA_INLINE Two finish(float2 sums, uint32_t eight, uint32_t outputs) {
    shlf_trans_mma_c(sums);
    arith.may_apply_f32_on_smem_write(sums, eight, outputs);
    Two two = this->float22num2(sums);
    arith.may_apply_on_smem_write(reinterpret_cast<uint32_t &>(two), eight, outputs);
    return two;
  }

  CUDA_INLINE Two silu(Two x) {
    float2 wide = this->num22float2(x);
    wide.x = __fdividef(wide.x, 1.0f + __expf(-wide.x));
    wide.y = __fdividef(wide.y, 1.0f + __expf(-wide.y));
    return this->float22num2(wide);
  }

  // Each four warps store the 64 outputs of a token that they have computed.
  CUDA_INLINE void store() {
    if (context.k_warp_id() != 0) return;
    bool leads = false;
    if (context.math_thread_id() % 128 < 32) leads = warp_elect_leader();
    if (!leads) return;
    const uint32_t group = context.n_warp_id() / 4;
    tma_store_3d(context.smem.reduce + group * Storage::kOutputRows * 8, context.params.c, 0, row, columns + group);
    tma_commit_store_group();
  }
};
