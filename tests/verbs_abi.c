/* What rt/_rdma.h and transports/verbs.py say of the verbs' structs, held against <infiniband/verbs.h>: it compiles, or they are wrong.
 *
 * May live here: sizes, offsets and constants. May not: anything that runs.
 */
#include <infiniband/verbs.h>
#include <stddef.h>

#include "_rdma.h"

#define SAME(theirs, ours) _Static_assert((int)(theirs) == (int)(ours), #theirs)
#define FIELD(theirs, field, ours, name) \
    SAME(offsetof(theirs, field), offsetof(ours, name)); \
    SAME(sizeof(((theirs *)0)->field), sizeof(((ours *)0)->name))

SAME(sizeof(struct ibv_sge), sizeof(rt_verbs_piece));
FIELD(struct ibv_sge, addr, rt_verbs_piece, address);
FIELD(struct ibv_sge, length, rt_verbs_piece, length);
FIELD(struct ibv_sge, lkey, rt_verbs_piece, key);

SAME(sizeof(struct ibv_send_wr), sizeof(rt_verbs_send));
FIELD(struct ibv_send_wr, wr_id, rt_verbs_send, id);
FIELD(struct ibv_send_wr, next, rt_verbs_send, next);
FIELD(struct ibv_send_wr, sg_list, rt_verbs_send, pieces);
FIELD(struct ibv_send_wr, num_sge, rt_verbs_send, piece_count);
FIELD(struct ibv_send_wr, opcode, rt_verbs_send, opcode);
FIELD(struct ibv_send_wr, send_flags, rt_verbs_send, flags);
FIELD(struct ibv_send_wr, imm_data, rt_verbs_send, immediate);
FIELD(struct ibv_send_wr, wr.rdma.remote_addr, rt_verbs_send, remote_address);
FIELD(struct ibv_send_wr, wr.rdma.rkey, rt_verbs_send, remote_key);

SAME(sizeof(struct ibv_recv_wr), sizeof(rt_verbs_receive));
FIELD(struct ibv_recv_wr, wr_id, rt_verbs_receive, id);
FIELD(struct ibv_recv_wr, next, rt_verbs_receive, next);
FIELD(struct ibv_recv_wr, sg_list, rt_verbs_receive, pieces);
FIELD(struct ibv_recv_wr, num_sge, rt_verbs_receive, piece_count);

SAME(sizeof(struct ibv_wc), sizeof(rt_verbs_completion));
FIELD(struct ibv_wc, wr_id, rt_verbs_completion, id);
FIELD(struct ibv_wc, status, rt_verbs_completion, status);
FIELD(struct ibv_wc, vendor_err, rt_verbs_completion, vendor);
FIELD(struct ibv_wc, byte_len, rt_verbs_completion, bytes);
FIELD(struct ibv_wc, imm_data, rt_verbs_completion, immediate);

FIELD(struct ibv_context, ops.poll_cq, rt_verbs_context, poll_cq);
FIELD(struct ibv_context, ops.req_notify_cq, rt_verbs_context, req_notify_cq);
FIELD(struct ibv_context, ops.post_send, rt_verbs_context, post_send);
FIELD(struct ibv_context, ops.post_recv, rt_verbs_context, post_recv);

SAME(offsetof(struct ibv_qp, context), 0);
SAME(offsetof(struct ibv_qp, send_cq), PAIR_QUEUE);
SAME(offsetof(struct ibv_qp, qp_num), PAIR_NUMBER);
SAME(offsetof(struct ibv_cq, channel), QUEUE_CHANNEL);
SAME(offsetof(struct ibv_comp_channel, fd), CHANNEL_FD);

SAME(IBV_WR_RDMA_WRITE_WITH_IMM, RT_WR_WRITE_WITH_IMM);
SAME(IBV_SEND_SIGNALED, RT_SEND_SIGNALED);
SAME(IBV_SEND_SOLICITED, RT_SEND_SOLICITED);
SAME(IBV_SEND_INLINE, RT_SEND_INLINE);
