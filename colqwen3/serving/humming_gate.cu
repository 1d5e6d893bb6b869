// How humming's kernel ends where its outputs are those of a gate: appended to the kernel's own source.
//
// Outputs alternate, eight of the gate and eight that it multiplies. A warp computes sixteen of them at a
// time, and each of its threads holds those of one row of eight and of the row eight further: so a thread
// has both factors, and half as many outputs are stored. Tiles are not split along the inputs.

template <class Mma, class Arithmetic, class... Options>
class EpilogueSmemWriter<KernelContext<Options...>, Mma, Arithmetic>
    : F16Conversion<typename KernelContext<Options...>::ElementC> {
  using Context = KernelContext<Options...>;
  using Storage = typename Context::SharedStorage;
  using Sums = typename Mma::CRegistersArrayType;
  using Two = typename F16Conversion<typename Context::ElementC>::scalar_t2;
  static constexpr uint32_t kSixteens = Context::WarpShape::N / 16, kEights = Context::WarpShape::M / 8;
  static constexpr uint32_t kBlock = 64;  // outputs that lie together in shared memory, a token after another
  static constexpr uint32_t kWarps = kBlock / (Context::WarpShape::N / 2);  // that compute a block
  static_assert(sizeof(Sums) == kSixteens * kEights * 2 * sizeof(float2));

public:
  Context &context;
  Arithmetic &arithmetic;

  CUDA_INLINE EpilogueSmemWriter(Context &context, Arithmetic &arithmetic)
      : context(context), arithmetic(arithmetic) {}

  CUDA_INLINE void write(uint32_t *registers, uint32_t, uint32_t) {
    if (context.k_warp_id() != 0) return;
    float2 *sums = reinterpret_cast<float2 *>(registers);
    Two *stored = reinterpret_cast<Two *>(context.smem.reduce);
    const uint32_t lane = context.lane_id(), warp = context.n_warp_id();
    const uint32_t token = lane % 4 * 2 + lane % 8 / 4;  // of eight, once sums are exchanged
    const uint32_t swizzle = (token + offsetof(Storage, reduce) / 128) % 8;
    stored += warp / kWarps * (Storage::kOutputRows * kBlock / 2) + token * (kBlock / 2) + lane / 8;
    PRAGMA_UNROLL
    for (uint32_t sixteen = 0; sixteen < kSixteens; sixteen++) {
      const uint32_t place = (warp % kWarps * kSixteens + sixteen ^ swizzle) * 4;
      PRAGMA_UNROLL
      for (uint32_t eight = 0; eight < kEights; eight++) {
        float2 *both = sums + (sixteen * kEights + eight) * 2;
        const Two gate = finish(both[0], eight, sixteen * 2), up = finish(both[1], eight, sixteen * 2 + 1);
        stored[eight * 8 * (kBlock / 2) + place] = __hmul2(silu(gate), up);
      }
    }
  }

private:
  // Returns two outputs of one token.
  CUDA_INLINE Two finish(float2 sums, uint32_t eight, uint32_t outputs) {
    shlf_trans_mma_c(sums);
    arithmetic.may_apply_f32_on_smem_write(sums, eight, outputs);
    Two two = this->float22num2(sums);
    arithmetic.may_apply_on_smem_write(reinterpret_cast<uint32_t &>(two), eight, outputs);
    return two;
  }

  CUDA_INLINE Two silu(Two x) {
    float2 wide = this->num22float2(x);
    wide.x = __fdividef(wide.x, 1.0f + __expf(-wide.x));
    wide.y = __fdividef(wide.y, 1.0f + __expf(-wide.y));
    return this->float22num2(wide);
  }
};

template <class Arithmetic, class... Options> class EpilogueGmemWriter<KernelContext<Options...>, Arithmetic> {
  using Context = KernelContext<Options...>;
  using Storage = typename Context::SharedStorage;
  static_assert(Context::kUseTmaC && !Context::kUseStreamK && Storage::kUseWarpgroupOutput);
  static_assert(Context::WarpShape::N == 32 && Context::WarpShape::M == Context::BlockShape::M);

public:
  static constexpr bool kUseWarpgroupEpilogue = true, kHasNativeAtomicAdd = true;
  Context &context;
  uint32_t row = 0, block = 0;

  CUDA_INLINE EpilogueGmemWriter(Context &context, Arithmetic &) : context(context) {}

  CUDA_INLINE void seek(uint32_t m_block, uint32_t n_block, uint32_t, uint32_t) {
    row = m_block * Context::BlockShape::M;
    block = n_block * (Context::BlockShape::N / 128);
  }

  // Each four warps store the block of 64 outputs that they have computed.
  CUDA_INLINE void write(uint32_t, uint32_t, uint32_t) {
    if (context.k_warp_id() != 0) return;
    bool leads = false;
    if (context.math_thread_id() % 128 < 32) leads = warp_elect_leader();
    if (!leads) return;
    const uint32_t part = context.n_warp_id() / 4;
    tma_store_3d(context.smem.reduce + part * Storage::kOutputRows * 8, context.params.c, 0, row, block + part);
    tma_commit_store_group();
  }
};
